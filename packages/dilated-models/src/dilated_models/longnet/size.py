"""How much memory a model needs, and how much there is: known before anything is allocated."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from dilated_models.config import LongNetConfig

# Modules, parameters and their names, as Python objects; measured: 38 KB per block.
_OBJECT_BYTES_PER_LAYER = 38_000


def least_parameters(config: LongNetConfig) -> int:
    """Number of weights in matrices and convolutions: more than 99 % of a model's parameters.

    Computed, because building the model on the meta device imports the compiler: five CPU-seconds.

    Example:
        >>> least_parameters(LongNetConfig(num_tokens=256))
        85327872
    """
    vocabulary = config.num_tokens * config.d_model * (1 if config.tie_embeddings else 2)
    projections = 2 * (config.d_model + config.kv_dim)
    block = config.d_model * (projections + 2 * config.dim_feedforward + config.key_conv)
    cross = config.d_model * projections if config.num_encoder_layers else 0
    blocks = num_blocks(config) * block + config.num_decoder_layers * cross
    return vocabulary + blocks


def num_blocks(config: LongNetConfig) -> int:
    """Blocks of the encoder and the decoder together."""
    return config.num_encoder_layers + config.num_decoder_layers


def model_bytes(config: LongNetConfig) -> int:
    """Memory of a float32 model: its parameters and its Python objects."""
    return 4 * least_parameters(config) + _OBJECT_BYTES_PER_LAYER * num_blocks(config)


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated on a device, or None if this system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    limits = [limit for limit in (_of_system(), _of_control_group()) if limit is not None]
    return min(limits, default=None)


def _of_system() -> int | None:
    """Free memory and swap on Linux; elsewhere on POSIX, all memory."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return sum(int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None


def _of_control_group() -> int | None:
    """What a container's limit leaves, in control groups of version 2."""
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text("ascii"))  # "max" means no limit
        return limit - int((group / "memory.current").read_text("ascii"))
    except (OSError, ValueError):
        return None


def check_memory(needed: int, what: str, device: torch.device, fix: str) -> None:
    """Refuse what cannot fit, before it is allocated.

    Args:
        needed: Bytes.
        what: What needs them.
        device: Where.
        fix: What to do about it.

    Raises:
        ValueError: If less memory is available.
    """
    available = available_bytes(device)
    if available is not None and needed > available:
        raise ValueError(
            f"{what} needs about {gibibytes(needed)} of memory and {device} has "
            f"{gibibytes(available)} free; {fix}."
        )


def gibibytes(num_bytes: float) -> str:
    """A number of bytes for people.

    Example:
        >>> gibibytes(3 * 2**29)
        '1.5 GiB'
    """
    amount = num_bytes / 2**30
    return f"{amount:,.1f} GiB" if amount < 100 else f"{amount:,.0f} GiB"


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: on a GPU, of PyTorch's allocator there; else, of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no resource module
        import psutil

        return psutil.Process().memory_info().peak_wset  # pyright: ignore
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
