"""Gradient communication: hooks for DistributedDataParallel."""

from dilated_ring.gradients.topk import TopKCompression, topk_hook

__all__ = ["TopKCompression", "topk_hook"]
