"""How much memory a model needs, and how much there is: known before anything is allocated."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dilated_models.attention_kinds import options_with_defaults
from dilated_models.config import LongNetConfig

DISTANCE_STEPS = 28
"""Distances that the gate of learned block sparsity tells apart; see `dilated_sparse.adaptive`."""

# Modules, parameters and their names, as Python objects; measured: 38 KB per block.
_OBJECT_BYTES_PER_LAYER = 38_000


class Parameters(NamedTuple):
    """How many parameters a model has, by where they are.

    Attributes:
        embedding: Of the embedding; with tied weights also of the output layer.
        output: Of the output layer, if it has its own.
        norms: Of the LayerNorms behind the blocks.
        block: Of one block, without cross-attention.
        cross: Of the cross-attention of one block, with its LayerNorm.
        block_products, cross_products: Those of both that are weights of matrix products.
        num_blocks: Number of blocks, of encoder and decoder together.
        num_cross: How many of them have cross-attention.
    """

    embedding: int
    output: int
    norms: int
    block: int
    cross: int
    block_products: int
    cross_products: int
    num_blocks: int
    num_cross: int

    @property
    def outside(self) -> int:
        """Of everything but the blocks."""
        return self.embedding + self.output + self.norms

    @property
    def total(self) -> int:
        """Of the whole model."""
        return self.outside + self.num_blocks * self.block + self.num_cross * self.cross

    @property
    def products(self) -> int:
        """Weights of matrix products of all blocks."""
        return self.num_blocks * self.block_products + self.num_cross * self.cross_products


def count_parameters(config: LongNetConfig) -> Parameters:
    """The number of parameters of a model.

    Computed, because building the model on the meta device imports the compiler: five CPU-seconds.

    Example:
        >>> count_parameters(LongNetConfig(num_tokens=256)).total
        85541376
    """
    width, hidden = config.d_model, config.dim_feedforward
    projections = 2 * width * (width + config.kv_dim)
    biases = 2 * (width + config.kv_dim)
    more_products, more = _of_kind(config)
    products = projections + 2 * width * hidden + more_products
    # LayerNorms, of two numbers for each channel, stand before the attention, inside it, before the
    # feed-forward and inside it; the layers of the feed-forward have biases.
    others = biases + width + hidden + 2 * (3 * width + hidden) + config.key_conv * width
    others += more
    has_encoder = config.num_encoder_layers > 0
    return Parameters(
        embedding=config.num_tokens * width,
        output=0 if config.tie_embeddings else config.num_tokens * width,
        norms=2 * width * (1 + has_encoder) if config.final_layer_norm else 0,
        block=products + others,
        cross=projections + biases + 2 * width if has_encoder else 0,
        block_products=products,
        cross_products=projections if has_encoder else 0,
        num_blocks=config.num_encoder_layers + config.num_decoder_layers,
        num_cross=config.num_decoder_layers if has_encoder else 0,
    )


def _of_kind(config: LongNetConfig) -> tuple[int, int]:
    """What the attention of a kind has beside four projections: weights of products, and others."""
    if config.attention_kind not in ("nsa", "block_sparse_adaptive"):
        return 0, 0
    options: Any = options_with_defaults(config.attention_kind, dict(config.attention_options))
    width, kv_dim, D = config.d_model, config.kv_dim, config.head_dim
    if config.attention_kind == "block_sparse_adaptive":
        # Two forms of queries and keys, and what is added by distance, of each head of k.
        each = 2 * (4 * D + 3 * D) * options.gate_dim + (3 * D + 1) * DISTANCE_STEPS + 1
        return 0, kv_dim // D * each
    # Keys and values of two more branches, and two perceptrons that compress.
    size, hidden = options.compression_block_size * D, 2 * D
    products = 2 * width * 2 * kv_dim + 2 * (size * hidden + hidden * D)
    others = 2 * 2 * kv_dim + 2 * (size + hidden + D)
    if options.mix == "gate":
        hidden, gates = max(1, width // 4), 3 * config.nhead
        products += width * hidden + hidden * gates
        others += hidden + gates
    return products, others


def model_bytes(config: LongNetConfig) -> int:
    """Memory of a float32 model: its parameters and its Python objects."""
    sizes = count_parameters(config)
    return 4 * sizes.total + _OBJECT_BYTES_PER_LAYER * sizes.num_blocks


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
