"""Which device and dtype a command computes on."""

from __future__ import annotations

import torch
from dilated_core.checks import check_choice


def choose_device(name: str) -> torch.device:
    """The device with a name; `"auto"` is a CUDA device if there is one, else the CPU.

    Raises:
        ValueError: If no device has this name, or this machine lacks the device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"device is {name!r}; it must be auto, cpu, cuda, cuda:0 (or another number) or mps."
        ) from error
    present = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }.get(device.type, 0)
    if (device.index or 0) >= present:
        raise ValueError(f"device is {name!r}, which this machine does not have; use auto or cpu.")
    return device


def choose_dtype(name: str, device: torch.device) -> str:
    """`"float32"` or `"bfloat16"`; `"auto"` is bfloat16 on a GPU that has it, else float32.

    Raises:
        ValueError: If the name is another.
    """
    if name == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return "bfloat16" if has_bfloat16 else "float32"
    check_choice("dtype", name, ("auto", "float32", "bfloat16"))
    return name
