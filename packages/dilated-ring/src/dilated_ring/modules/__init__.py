"""Attention modules on shards, and the factory that builds them by name."""
