"""The fused Triton kernels and the backend made of them."""

from dilated_kernels.fused.backend import TritonBackend, backend

__all__ = ["TritonBackend", "backend"]
