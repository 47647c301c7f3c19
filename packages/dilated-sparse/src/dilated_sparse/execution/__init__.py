"""Attention over the kept blocks: a plan, and the calls of a backend that it lists."""
