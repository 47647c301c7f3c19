"""A launch is a value: which kernel, on which grid, with which arguments and constants.

`run` executes launches; tools/kernel_resources.py compiles the same values for GPUs that are not
there.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from threading import Lock
from typing import Any, NamedTuple

import torch
import triton

from dilated_kernels.fused import forward

# The interpreter keeps the position in the grid in a global variable.
_interpreter_lock = Lock()


class Launch(NamedTuple):
    """One launch of one kernel.

    Attributes:
        kernel: The Triton kernel.
        grid: Programs, by dimension.
        arguments: Tensors and numbers, in the order of the kernel's parameters.
        constants: The kernel's compile-time constants, and Triton's own options, by name.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """Execute the launches in their order on `device`, whose memory their tensors are in."""
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device, _interpreter_lock if is_interpreted() else nullcontext():
        for launch in launches:
            launch.kernel[launch.grid](*launch.arguments, **launch.constants)


def is_interpreted() -> bool:
    """Whether Triton interprets the kernels on the CPU, as `TRITON_INTERPRET=1` makes it."""
    return not isinstance(forward.forward_kernel, triton.JITFunction)


def dot_precision(dtype: torch.dtype) -> str:
    """How the kernels multiply matrices: true float32 unless PyTorch allows TF32."""
    if is_interpreted():
        return "upcast" if dtype == torch.bfloat16 else "ieee"
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"
