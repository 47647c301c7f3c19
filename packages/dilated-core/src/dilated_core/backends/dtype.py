"""Which dtype a device computes fast in. Nothing here runs at import or converts a tensor."""

from __future__ import annotations

import torch

# The first NVIDIA generation with bfloat16 in its matrix units (Ampere).
_BFLOAT16_CAPABILITY = (8, 0)


def recommended_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype in which a device computes attention fast without leaving float32's range.

    - CUDA: bfloat16 from compute capability 8.0 (Ampere) on, float32 before. float16 is fast on
      older GPUs too, but overflows at 65 504, so training in float16 needs loss scaling, which the
      user must choose. On ROCm the rule is the same, with the number that ROCm reports.
    - XPU: bfloat16 where PyTorch reports it for the device, otherwise float32.
    - MPS: float32. PyTorch does not report whether an Apple GPU computes bfloat16 or emulates it.
    - CPU: float32. Only some CPUs have bfloat16 units; PyTorch converts on the others.
    - Any other device: float32, which every device has.

    Args:
        device: Such as `"cuda:1"`; a CUDA device without an index is the current one.

    Raises:
        TypeError: If it is neither a string nor a device.
        ValueError: If it names no device, or a CUDA or XPU device that this machine lacks.

    Example:
        >>> recommended_dtype("cpu")
        torch.float32
    """
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device is {device!r}; it must be a torch.device or a string.")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device is {device!r}, which PyTorch does not know; give one such as 'cuda:0' or "
            f"'cpu'."
        ) from error
    if device.type == "cuda":
        _check_present(device, torch.cuda.device_count() if torch.cuda.is_available() else 0)
        fast = torch.cuda.get_device_capability(device) >= _BFLOAT16_CAPABILITY
    elif device.type == "xpu":
        _check_present(device, torch.xpu.device_count() if torch.xpu.is_available() else 0)
        properties = torch.xpu.get_device_properties(device)  # pyright: ignore[reportUnknownVariableType]
        fast = bool(properties.has_bfloat16_conversions)  # pyright: ignore[reportUnknownArgumentType]
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def _check_present(device: torch.device, count: int) -> None:
    if count == 0:
        raise ValueError(
            f"device is '{device}', and PyTorch finds no {device.type.upper()} device here; use "
            f"'cpu', or check the driver and whether this PyTorch was built for the device."
        )
    index: int | None = device.index  # torch's annotation leaves out the None
    if index is not None and index >= count:  # pyright: ignore[reportUnnecessaryComparison]
        raise ValueError(
            f"device is '{device}', and there are {count} {device.type.upper()} devices; the index "
            f"must be below that."
        )
