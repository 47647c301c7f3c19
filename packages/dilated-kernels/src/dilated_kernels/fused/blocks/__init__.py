"""Block-sparse attention: kernels that walk a list of blocks, and their launches."""
