"""NSA, native sparse attention (arXiv 2502.11089), as a function of three branches."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from dilated_core import (
    AttentionOutput,
    DilatedPattern,
    dilated_attention_with_lse,
    merge_partials,
)
from dilated_core.checks import check_choice, check_integer, check_tensor
from dilated_core.decoding.step import without_autocast
from dilated_core.inputs import cast_for_autocast, check_backend_name, check_inputs, check_scale
from dilated_core.merge import accumulation_dtype
from torch.nn.functional import pad

from dilated_sparse.presets.ops import attend_chosen, choose_nsa
from dilated_sparse.windowed.attention import windowed_dilated_attention_with_lse

Mix = Literal["gate", "lse"]
"""How the three branches become one result."""

# One segment of any length: a longer segment than the sequence is cut to its length.
_DENSE = DilatedPattern([2**40], [1])

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


class NSASizes(NamedTuple):
    """The sizes of the three branches, in positions or blocks; the defaults are the paper's.

    Attributes:
        compression_block_size: l, positions that one compressed key stands for.
        compression_stride: d, positions between compressed keys; divides the other two sizes.
        selection_block_size: l', positions of a block that queries choose; at least l.
        num_selected_blocks: n, blocks that a query sees, its own and the forced ones among them.
        num_initial_blocks: First blocks that are always chosen.
        num_local_blocks: Blocks up to the query's own, and with it, that are always chosen.
        window_size: w, the last positions that a query sees, its own among them.
    """

    compression_block_size: int = 32
    compression_stride: int = 16
    selection_block_size: int = 64
    num_selected_blocks: int = 16
    num_initial_blocks: int = 1
    num_local_blocks: int = 2
    window_size: int = 512

    def checked(self) -> NSASizes:
        """These sizes as ints, if they fit together.

        Raises:
            TypeError: If one is no integer.
            ValueError: If one is out of range, or they do not fit together.
        """
        least = {"num_initial_blocks": 0}
        size, d, m, n, initial, local, _ = sizes = NSASizes(
            *(
                check_integer(name, value, at_least=least.get(name, 1))
                for name, value in self._asdict().items()
            )
        )
        for name, value in (("compression_block_size", size), ("selection_block_size", m)):
            if value % d:
                raise ValueError(
                    f"{name} is {value} and compression_stride {d}; the stride must divide it."
                )
        if m < size:
            raise ValueError(
                f"selection_block_size is {m} and compression_block_size {size}; it must not be "
                f"smaller."
            )
        if n < initial + local:
            raise ValueError(
                f"num_selected_blocks is {n}; {initial} initial and {local} local blocks are "
                f"always chosen, so it must be at least {initial + local}."
            )
        return sizes

    def num_compressed(self, seq_len: int) -> int:
        """C, compressed keys of S positions: those whose positions all exist."""
        length = seq_len - self.compression_block_size
        return length // self.compression_stride + 1 if length >= 0 else 0


PAPER_SIZES = NSASizes()


def native_sparse_attention(
    q: torch.Tensor,
    compressed: KeysAndValues,
    selected: KeysAndValues,
    window: KeysAndValues,
    gates: torch.Tensor | None = None,
    *,
    sizes: NSASizes = PAPER_SIZES,
    mix: Mix = "gate",
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal attention in three branches, each with keys and values of its own: NSA.

    - Compressed: each query sees the compressed keys of blocks that end at or before it.
    - Selected: it sees its own block up to itself, and earlier blocks. The first ones and the
      nearest ones are always chosen; the others by the attention of the compressed branch, summed
      over the heads that share keys. The choice has no gradient of its own.
    - Window: it sees the last `window_size` positions, itself among them.

    `mix="gate"` is the paper: Σ g_c · out_c with one softmax in each branch. That sum is not one
    softmax, and its weights need not add up to 1. `mix="lse"` is one softmax over the keys of all
    branches together, without gates. A position that several branches see then counts once in each
    of them, with the keys and values of that branch.

    Source: Yuan et al., "Native Sparse Attention", arXiv 2502.11089, section 3. Eq. 9 is read with
    indices from 1: a block's score adds the probability of each compressed key once for each stride
    that both have in common.

    Args:
        q: `(B, S, H, D)`: batch, sequence, heads, head_dim. Any S, any strides.
        compressed: Keys and values `(B, C, H_kv, D)`, C = `sizes.num_compressed(S)`. Number i
            stands for the positions from i · `compression_stride` on.
        selected, window: Keys and values `(B, S, H_kv, D)`; H_kv divides H, and H/H_kv consecutive
            heads of q share one of them and choose together.
        gates: `(B, S, H, 3)`: of the compressed, selected and window branch. For `mix="gate"` only.
        sizes: Of the branches.
        mix: `"gate"` or `"lse"`.
        scale: Factor of the scores; 1/√D if None.
        backend: `"auto"` or a name of `dilated_core.available_backends()`.

    Returns:
        `(B, S, H, D)` in the dtype of q.

    Raises:
        TypeError: If an argument has the wrong type, or dtypes differ or are not floating.
        ValueError: If shapes, heads or devices do not fit, gates are missing or given in vain, or
            the backend cannot run the inputs.

    Example:
        >>> sizes = NSASizes(8, 4, 8, num_selected_blocks=4, window_size=16)
        >>> q, k, v = torch.randn(3, 1, 100, 4, 16).unbind()
        >>> pooled = [x.unfold(1, 8, 4).mean(-1) for x in (k, v)]
        >>> gates = torch.full((1, 100, 4, 3), 0.5)
        >>> native_sparse_attention(q, pooled, (k, v), (k, v), gates, sizes=sizes).shape
        torch.Size([1, 100, 4, 16])
    """
    check_choice("mix", mix, get_args(Mix))
    check_backend_name(backend)
    q, kc, vc, ks, vs, kw, vw = cast_for_autocast(q, *compressed, *selected, *window)
    check_inputs(q, ks, vs)
    check_inputs(q, kw, vw)
    sizes = sizes.checked()
    shape = (q.shape[0], sizes.num_compressed(q.shape[1]), *ks.shape[2:])
    for name, x in (("keys", kc), ("values", vc)):
        check_tensor(f"compressed {name}", x)
        if x.shape != shape or x.dtype != q.dtype or x.device != q.device or kw.shape != ks.shape:
            raise ValueError(
                f"compressed {name} have shape {tuple(x.shape)}, selected keys {tuple(ks.shape)} "
                f"and window keys {tuple(kw.shape)}; with these sizes the first must be "
                f"{tuple(shape)}, and the others equal, all of one dtype and device."
            )
    if (gates is None) == (mix == "gate"):
        raise ValueError(
            f"mix is {mix!r} and gates are {'missing' if gates is None else 'given'}; mix='gate' "
            f"multiplies each branch by its gate, and mix='lse' has none."
        )
    scale = check_scale(scale, q.shape[-1])
    coarse = _attend_compressed(q, kc, vc, sizes, scale, backend)
    choice = choose_nsa(
        *(q, kc, coarse.lse, scale),
        [
            sizes.compression_block_size,
            sizes.compression_stride,
            sizes.selection_block_size,
            sizes.num_selected_blocks - 1,
            sizes.num_initial_blocks,
            sizes.num_local_blocks,
        ],
    )
    fine = attend_chosen(
        *(q, ks, vs, choice, sizes.selection_block_size), scale=scale, backend=backend
    )
    near = windowed_dilated_attention_with_lse(
        *(q, kw, vw, None, sizes.window_size), is_causal=True, scale=scale, backend=backend
    )
    if gates is None:
        return merge_partials([coarse, fine, near]).out
    check_tensor("gates", gates)
    if gates.shape != (*q.shape[:3], 3):
        raise ValueError(
            f"gates have shape {tuple(gates.shape)}; they must be {(*q.shape[:3], 3)}, one for "
            f"each branch of each head."
        )
    wide = accumulation_dtype(q.dtype)
    outs = torch.stack([part.out.to(wide) for part in (coarse, fine, near)], -1)
    with without_autocast(q.device.type):
        return (outs @ gates.to(wide).unsqueeze(-1)).squeeze(-1).to(q.dtype)


def _attend_compressed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sizes: NSASizes,
    scale: float,
    backend: str,
) -> AttentionOutput:
    """The compressed branch; out 0 and lse −∞ for queries before the end of the first block.

    The d queries from the end of compressed block i on see the compressed keys up to i: a
    staircase. Every d-th query makes a causal square with the compressed keys, so d squares are
    the staircase.
    """
    (B, S, H, D), C, d = q.shape, k.shape[1], sizes.compression_stride
    first = sizes.compression_block_size - 1
    if C == 0:
        # No gradient, but a part of the graph: a module then gives each parameter a gradient.
        out = q.new_zeros(q.shape) + 0 * (k.sum() + v.sum())
        lse = torch.full((B, S, H), -torch.inf, dtype=accumulation_dtype(q.dtype), device=q.device)
        return AttentionOutput(out, lse)
    rows = pad(q[:, first:], (0, 0, 0, 0, 0, C * d - (S - first)))
    squares = rows.view(B, C, d, H, D).transpose(1, 2).flatten(0, 1)
    k, v = (x.unsqueeze(1).expand(-1, d, -1, -1, -1).flatten(0, 1) for x in (k, v))
    result = dilated_attention_with_lse(
        *(squares, k, v, _DENSE), is_causal=True, scale=scale, backend=backend
    )
    out, lse = (
        x.view(B, d, C, *x.shape[2:]).transpose(1, 2).flatten(1, 2)[:, : S - first] for x in result
    )
    return AttentionOutput(
        pad(out, (0, 0, 0, 0, first, 0)), pad(lse, (0, 0, first, 0), value=-torch.inf)
    )
