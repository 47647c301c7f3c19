"""Patterns in other forms: a plot, a safetensors file, a BlockMask of FlexAttention."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from dilated_core.checks import check_bool, check_integer

from dilated_sparse.pattern.blocks import BlockPattern

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_FORMAT = "dilated_sparse.BlockPattern 1"


def plotted(pattern: BlockPattern, *, head: int = 0, ax: Any = None) -> Any:
    """Draw the kept blocks of a head: queries from top to bottom, keys from left to right.

    Args:
        pattern: What to draw.
        head: The head; a shared pattern is the same for all.
        ax: Matplotlib axes to draw into; None for a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    if ax is None:
        pyplot: Any = _imported("matplotlib.pyplot", "plot", "to plot a pattern")
        ax = pyplot.subplots(figsize=(4, 4))[1]
    p = 0 if pattern.num_heads == 1 else head
    check_integer("head", p, at_least=0, at_most=pattern.num_heads - 1)
    ax.imshow(pattern.materialize()[p].numpy(), cmap="Blues", vmin=0, vmax=1.4)
    ax.set_xlabel("block of keys")
    ax.set_ylabel("block of queries")
    ax.set_title(f"{pattern.num_blocks} blocks, {pattern.sparsity_ratio:.1%} kept", fontsize=9)
    return ax


def save_pattern(pattern: BlockPattern, path: Path) -> None:
    """Write the lists to a safetensors file.

    Raises:
        ImportError: If safetensors is not installed.
    """
    safetensors: Any = _imported("safetensors.torch", "files", "to save a pattern")
    tensors = {"row_offsets": pattern.row_offsets, "block_indices": pattern.block_indices}
    safetensors.save_file(tensors, path, metadata={"format": _FORMAT})


def load_pattern(path: Path) -> BlockPattern:
    """Read a pattern that `save_pattern` has written.

    Raises:
        ImportError: If safetensors is not installed.
        ValueError: If the file holds something else, or its lists are no pattern.
    """
    safetensors: Any = _imported("safetensors.torch", "files", "to load a pattern")
    tensors: dict[str, torch.Tensor] = safetensors.load_file(path)
    if tensors.keys() != {"row_offsets", "block_indices"}:
        raise ValueError(
            f"{path} holds {sorted(tensors)}; a pattern is row_offsets and block_indices, as "
            f"BlockPattern.save writes them."
        )
    return BlockPattern(tensors["row_offsets"], tensors["block_indices"])


def block_mask_of(
    pattern: BlockPattern,
    seq_len: int,
    *,
    block_size: int,
    num_heads: int | None,
    is_causal: bool,
    device: torch.device | str,
) -> BlockMask:
    """A FlexAttention mask that keeps the same positions as `block_sparse_attention`.

    FlexAttention pads its lists to the number of blocks, so the mask takes O(H·N²) memory. On a GPU
    its kernel wants blocks of 128 positions, or another multiple of its tiles.

    Args:
        pattern: Of ⌈seq_len / block_size⌉ blocks.
        seq_len: S.
        block_size: Positions of a block.
        num_heads: H of the mask; None for that of the pattern, 1 if it is shared, which
            FlexAttention applies to all heads.
        is_causal: Whether query i sees only the keys j ≤ i.
        device: Of the mask.

    Raises:
        ValueError: If the pattern has another number of blocks.
    """
    # Imports the compiler, which takes seconds.
    from torch.nn.attention.flex_attention import BlockMask

    S = check_integer("seq_len", seq_len, at_least=1)
    size = check_integer("block_size", block_size, at_least=1)
    N = -(-S // size)
    if pattern.num_blocks != N:
        raise ValueError(
            f"the pattern has {pattern.num_blocks} blocks; {S} positions in blocks of {size} are "
            f"{N}."
        )
    if check_bool("is_causal", is_causal):
        pattern = pattern.causal()
    table = pattern.materialize(num_heads=num_heads).to(device)
    # Blocks on the diagonal, when causal, are those in which not every query sees every key.
    partial = table & torch.eye(N, dtype=torch.bool, device=device) & is_causal
    full = table & ~partial

    def sees(b: Any, h: Any, q: Any, k: Any) -> Any:
        kept = table[h if table.shape[0] > 1 else 0, q // size, k // size]
        return kept & (q >= k) if is_causal else kept

    return BlockMask.from_kv_blocks(
        *_packed_lists(partial),
        *_packed_lists(full),
        BLOCK_SIZE=size,
        mask_mod=sees,
        seq_lengths=(S, S),
    )


def _packed_lists(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For `(H, N, N)` bool: how many blocks each row keeps, and these first; `(1, H, N, …)`."""
    order = torch.argsort((~kept).int(), dim=-1, stable=True)
    return kept.sum(-1, dtype=torch.int32).unsqueeze(0), order.int().unsqueeze(0).contiguous()


def _imported(module: str, extra: str, purpose: str) -> Any:
    """An optional package.

    Raises:
        ImportError: If it is not installed, with the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ImportError(
            f"{name} is needed {purpose}: pip install 'dilated-sparse[{extra}]'."
        ) from error
