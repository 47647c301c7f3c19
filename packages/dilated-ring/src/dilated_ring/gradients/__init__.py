"""Gradient communication: hooks for DistributedDataParallel."""
