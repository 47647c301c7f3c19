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


def device_of_process(name: str, *, local_rank: int, local_size: int) -> torch.device:
    """The device of one of several processes on a machine; each has a GPU of its own, or the CPU.

    Args:
        name: As in `choose_device`. `"auto"` is the CPU if there are fewer GPUs than processes.
        local_rank: Number of the process on its machine.
        local_size: Number of processes on this machine.

    Raises:
        ValueError: As `choose_device`; or if processes would share a GPU.
    """
    if name == "auto":
        has_enough = torch.cuda.is_available() and torch.cuda.device_count() >= local_size
        return torch.device("cuda", local_rank) if has_enough else torch.device("cpu")
    device = choose_device(f"cuda:{local_rank}" if name == "cuda" else name)
    if device.type != "cpu" and local_size > 1 and name != "cuda":
        raise ValueError(
            f"device is {name!r} and {local_size} processes run on this machine; each must have a "
            f"device of its own, so use auto, cuda or cpu."
        )
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
