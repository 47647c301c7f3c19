"""What this machine has: libraries and devices, and a sentence for each thing that is missing.

No other module tests for a library or a device. Nothing is tested before a backend needs it. A
library is imported last, after its version fits. Nothing here raises: a broken library is a reason
like any other.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import re
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from dilated_core.backends.contract import AttentionInputs

HALF_DTYPES = (torch.bfloat16, torch.float16)

Capability = tuple[int, int]

_AMPERE: Capability = (8, 0)
_CUDNN_9 = 90000


class Library(NamedTuple):
    """An optional library and the releases whose functions the adapter knows.

    Attributes:
        distribution: Its name for pip.
        module: The module that the adapter imports.
        minimum: The first release that works.
        below: The first later release that does not work; "" if none is known.
        install: The command or the advice to install it.
    """

    distribution: str
    module: str
    minimum: str
    below: str
    install: str


def cuda_reasons(
    inputs: AttentionInputs, *, minimum: Capability, exactly: tuple[Capability, ...] = ()
) -> list[str]:
    """Reasons why the device of `inputs` cannot run an NVIDIA kernel.

    Args:
        inputs: The call.
        minimum: The first compute capability that can.
        exactly: The only ones that can, where not all from `minimum` on can.
    """
    kind = inputs.device.type
    if kind != "cuda":
        return [f"the device is {kind}; it runs on CUDA devices only."]
    if torch.version.hip is not None:
        return ["this PyTorch is built for ROCm; it runs on NVIDIA GPUs only."]
    capability = cuda_capability(inputs.device)
    if capability is None:
        return ["the device is cuda; this PyTorch sees no CUDA device."]
    if exactly and capability not in exactly:
        return [f"the GPU has compute capability {_dotted(capability)}; it runs on "
                f"{', '.join(map(_dotted, exactly))} only."]  # fmt: skip
    if capability < minimum:
        return [f"the GPU has compute capability {_dotted(capability)}; it needs "
                f"{_dotted(minimum)} or newer."]  # fmt: skip
    if inputs.dtype == torch.bfloat16 and capability < _AMPERE:
        return [f"the dtype is bfloat16; the GPU has compute capability {_dotted(capability)}, and "
                f"bfloat16 needs {_dotted(_AMPERE)}."]  # fmt: skip
    return []


def cudnn_reasons() -> list[str]:
    """Reasons why cuDNN's attention cannot run any call."""
    version = cudnn_version()
    if version is None:
        return ["PyTorch finds no cuDNN; install a CUDA build of PyTorch."]
    if version < _CUDNN_9:
        return [f"cuDNN is {version}; its attention takes short sequences from 9.0 ({_CUDNN_9}) "
                f"on: install a newer PyTorch."]  # fmt: skip
    return []


def input_reasons(
    inputs: AttentionInputs,
    *,
    dtypes: tuple[torch.dtype, ...],
    head_dim_multiple: int,
    max_head_dim: int | None,
) -> list[str]:
    """Reasons that lie in the call: its dtype, head_dim, dropout and mask.

    Vendor kernels draw their own dropout mask, which does not follow from the seed of the call, and
    have no mask of keys.

    Args:
        inputs: The call.
        dtypes: The dtypes that both forward and backward take.
        head_dim_multiple: A divisor that head_dim must have.
        max_head_dim: The largest head_dim of both directions; None if there is no limit.
    """
    reasons: list[str] = []
    if inputs.dtype not in dtypes:
        dtype, *names = (str(d).removeprefix("torch.") for d in (inputs.dtype, *dtypes))
        reasons.append(f"the dtype is {dtype}; it takes {', '.join(names)}.")
    if inputs.head_dim % head_dim_multiple:
        reasons.append(
            f"head_dim is {inputs.head_dim}; it needs a multiple of {head_dim_multiple}."
        )
    if max_head_dim is not None and inputs.head_dim > max_head_dim:
        reasons.append(f"head_dim is {inputs.head_dim}; it takes at most {max_head_dim}.")
    if inputs.dropout_p:
        reasons.append(
            f"dropout_p is {inputs.dropout_p}; its dropout cannot be repeated from a seed, so it "
            f"is not offered."
        )
    if inputs.has_key_padding_mask:
        reasons.append("key_padding_mask is given; it has no mask of keys.")
    return reasons


def library_reasons(library: Library) -> list[str]:
    """Reasons why `library` cannot be used: absent, of another release, or broken."""
    version = installed_version(library.distribution)
    if version is None:
        return [f"{library.distribution} is not installed; {library.install}."]
    release = _release(version)
    if release < _release(library.minimum):
        return [f"{library.distribution} is {version}; it needs {library.minimum} or newer: "
                f"{library.install}."]  # fmt: skip
    if library.below and release >= _release(library.below):
        return [f"{library.distribution} is {version}; it needs a release before {library.below}: "
                f"{library.install}."]  # fmt: skip
    if problem := import_problem(library.module):
        return [f"{library.distribution} {version} is installed but cannot be imported "
                f"({problem}); install a build for torch {torch.__version__}."]  # fmt: skip
    return []


def cuda_capability(device: torch.device) -> Capability | None:
    """Compute capability of a CUDA device; None if there is no such device."""
    if not torch.cuda.is_available():
        return None
    if device.index is not None and device.index >= torch.cuda.device_count():  # pyright: ignore[reportUnnecessaryComparison]
        return None
    return torch.cuda.get_device_capability(device)


def cudnn_version() -> int | None:
    """Version of cuDNN as one number, 91100 for 9.11.0; None without cuDNN."""
    if not torch.backends.cudnn.is_available():
        return None
    return torch.backends.cudnn.version()


@lru_cache(maxsize=32)
def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@lru_cache(maxsize=32)
def import_problem(module: str) -> str:
    """The error that importing `module` raises; "" if it works.

    A compiled extension for another PyTorch raises any of these errors. The result is cached,
    because Python would import a broken module again at each call.
    """
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        first_line = str(error).partition("\n")[0]
        return f"{type(error).__name__}: {first_line}"
    return ""


def imported(module: str) -> Any:
    """The module, without types."""
    return importlib.import_module(module)


def _release(version: str) -> tuple[float, ...]:
    """A key to compare versions: 4.0.0b20 < 4.0.0b36 < 4.0.0 < 4.0.1; 2.8.3+local = 2.8.3."""
    match = re.match(r"(\d+(?:\.\d+)*)(?:\.?(?:a|b|rc)(\d+))?", version)
    if match is None:
        return (0,)
    numbers = [float(part) for part in match[1].split(".")]
    padded = numbers + [0.0] * (3 - len(numbers))
    return (*padded, float(match[2]) if match[2] else math.inf)


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))
