"""Sequences larger than memory."""
