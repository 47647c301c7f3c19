"""Attention of local queries over the keys of all ranks."""
