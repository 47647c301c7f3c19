"""Block-sparse attention as PyTorch modules, with their options and factories."""
