"""Rows of the attention matrix: exact probabilities of chosen queries, in sequences of any length.

B batch, H heads, N rows asked for, K keys that the widest of them sees, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Never, cast

import torch

from dilated_core.checks import check_bool, check_head_range, check_integer, check_names
from dilated_core.inputs import check_inputs, check_key_padding_mask, check_scale
from dilated_core.pattern.branches import DilatedPattern, check_pattern
from dilated_core.pattern.visible import unchecked_visible_keys

_GATHERED_ELEMENTS = 2**24
"""Elements of k that are gathered at once: 64 MiB in float32."""

_ARGUMENTS = ("is_causal", "scale", "key_padding_mask", "head_range")


class AttentionRows(NamedTuple):
    """Rows of the attention matrix, without the keys that their queries do not see.

    Attributes:
        positions: int64 `(H, N, K)`, the positions of the keys that each row sees, ascending and
            each once; −1 behind the last one where a row sees fewer than K.
        probabilities: `(B, H, N, K)`, float32 (float64 for float64 inputs); 0 where `positions` is
            −1.
    """

    positions: torch.Tensor
    probabilities: torch.Tensor


def attention_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    pattern: DilatedPattern,
    rows: torch.Tensor | Sequence[int],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: torch.Tensor | None = None,
    head_range: Sequence[int] | None = None,
    **unknown: Never,
) -> AttentionRows:
    """Attention probabilities of chosen queries, as `dilated_attention` uses them.

    For heat-maps, and to see which keys mattered to a query. Time and memory grow with the keys
    that the chosen queries see, not with S: row i holds n(i, j)·exp(s(i, j)) / Σ, where n(i, j) is
    how many branches let query i see key j (arXiv 2307.02486, eq. 9–10, as one softmax).
    Differentiable in q and k; the gradient of k has the size of k.

    Args:
        q: `(B, S, H, D)`, floating. Any strides.
        k: `(B, S, H_kv, D)`; H_kv divides H. Dtype and device of q.
        pattern: The branches. With `padding="attended"`, what a row lacks to a sum of 1 is the
            share of its zero keys.
        rows: N positions of queries in [0, S), in any order: an integer tensor of one dimension or
            a sequence of integers.
        is_causal: Query i sees only the keys j ≤ i.
        scale: Factor of the scores; 1/√D if None.
        key_padding_mask: `(B, S)` bool, True for keys that nobody sees, whatever they hold. They
            keep their entries in `positions`, which all batch rows share, with probability 0.
        head_range: `(first, total)` if the H heads are those from `first` on of `total` heads, as
            for `dilated_attention`.

    Returns:
        The positions and the probabilities. A row that no branch selects has positions −1, and one
        that sees no key has probabilities 0, never NaN.

    Raises:
        TypeError: If an argument has the wrong type, or dtypes differ or are not floating.
        ValueError: If shapes or devices do not fit, or a row or the scale is out of range.

    Example:
        >>> q, k = torch.zeros(2, 1, 100, 2, 16).unbind()
        >>> positions, probabilities = attention_rows(q, k, DilatedPattern([3, 9], [1, 4]), [40])
        >>> positions[:, 0]  # head 0 also keeps 36, 40 and 44, so it sees 40 twice
        tensor([[36, 39, 40, 41, 44],
                [39, 40, 41, -1, -1]])
        >>> probabilities[0, 0, 0]
        tensor([0.1667, 0.1667, 0.3333, 0.1667, 0.1667])
    """
    check_names("attention_rows", unknown, _ARGUMENTS)
    check_pattern(pattern)
    check_inputs(q, k, None)
    check_bool("is_causal", is_causal)
    first_head, num_heads = check_head_range(head_range, q.shape[2])
    if key_padding_mask is not None:
        check_key_padding_mask(key_padding_mask, q)
    scale = check_scale(scale, q.shape[-1])
    chosen = _checked_rows(rows, q.shape[1])
    # On the CPU: the numbers come from Python, and the size of the result depends on them.
    positions, counts, zero_keys = (
        x.to(q.device)
        for x in _keys_of_rows(
            pattern,
            chosen,
            q.shape[1],
            range(first_head, first_head + q.shape[2]),
            num_heads,
            is_causal=is_causal,
        )
    )
    H, N, K = positions.shape
    if q.shape[0] * H * N * K == 0:
        dtype = torch.promote_types(q.dtype, torch.float32)
        return AttentionRows(positions, q.new_zeros((q.shape[0], H, N, K), dtype=dtype))
    rows_at_once = max(1, _GATHERED_ELEMENTS // (q.shape[0] * H * K * q.shape[3]))
    row_index = torch.tensor(chosen, device=q.device)
    # Autocast would compute the scores in half precision. Meta tensors have no autocast.
    device_type = q.device.type if torch.amp.is_autocast_available(q.device.type) else "cpu"
    with torch.autocast(device_type, enabled=False):
        parts = [
            _probabilities(
                q[:, row_index[chunk]].transpose(1, 2),
                k,
                scale,
                positions[:, chunk],
                counts[:, chunk],
                zero_keys[:, chunk],
                key_padding_mask,
            )
            for chunk in (slice(i, i + rows_at_once) for i in range(0, N, rows_at_once))
        ]
    return AttentionRows(positions, torch.cat(parts, dim=2))


def _probabilities(
    q_BHND: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    positions_HNK: torch.Tensor,
    counts_HNK: torch.Tensor,
    zero_keys_HN: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
) -> torch.Tensor:
    """The softmax of the rows, `(B, H, N, K)`, where key j counts `counts` times."""
    dtype = torch.promote_types(k.dtype, torch.float32)
    H = q_BHND.shape[1]
    kv_head = torch.arange(H, device=k.device) // (H // k.shape[2])
    # Key 0 is read where there is none; its count is 0.
    read_HNK = positions_HNK.clamp(min=0)
    counts = counts_HNK.to(dtype)
    if key_padding_mask is not None:
        counts = counts * ~key_padding_mask[:, read_HNK]
    hidden = (counts == 0).expand(k.shape[0], *positions_HNK.shape)
    # A hidden key becomes 0, since 0 · NaN in the backward of the product would reach q.
    k_BHNKD = k[:, read_HNK, kv_head[:, None, None]].masked_fill(hidden[..., None], 0)
    scores = torch.einsum("bhnd,bhnkd->bhnk", q_BHND.to(dtype), k_BHNKD.to(dtype)) * scale
    scores = scores.masked_fill(hidden, -torch.inf)
    # Zero keys have score 0. A finite shift keeps −inf − −inf from ever being formed.
    largest = scores.detach().amax(-1, keepdim=True)
    has_zero_keys = zero_keys_HN[..., None] > 0
    largest = torch.where(has_zero_keys, largest.clamp(min=0), largest)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    weights = counts * (scores - largest).exp()
    # The clamp is for rows without zero keys, where 0 · exp(200) would be NaN.
    zero_weight = zero_keys_HN[..., None] * (-largest).clamp(max=0).exp()
    total = weights.sum(-1, keepdim=True) + zero_weight
    return weights / total.masked_fill(total == 0, 1)


def _keys_of_rows(
    pattern: DilatedPattern,
    rows: list[int],
    seq_len: int,
    heads: range,
    num_heads: int,
    *,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Distinct positions and their counts, int64 `(H, N, K)`, and zero keys, int64 `(H, N)`."""
    H, N, device = len(heads), len(rows), "cpu"
    if H * N == 0:
        empty = torch.empty(H, N, 0, dtype=torch.int64, device=device)
        return empty, empty, empty.sum(-1)
    seen = [
        [
            unchecked_visible_keys(pattern, row, head, num_heads, seq_len, is_causal=is_causal)
            for row in rows
        ]
        for head in heads
    ]
    zero_keys = torch.tensor([[keys.zero_keys for keys in head] for head in seen], device=device)
    parts: list[torch.Tensor] = []
    for branch, rate in enumerate(pattern.dilation_rates):
        ranges = [[keys.positions[branch] for keys in head] for head in seen]
        # (H, N, 1), so that a range becomes first + rate · index.
        first = torch.tensor([[[x.start] for x in head] for head in ranges], device=device)
        length = torch.tensor([[[len(x)] for x in head] for head in ranges], device=device)
        index = torch.arange(max(len(x) for head in ranges for x in head), device=device)
        # A rate beyond S, which may exceed 64 bits, is never stepped by.
        step = min(rate, seq_len)
        parts.append((first + step * index).masked_fill(index >= length, seq_len))
    # Equal positions become neighbours, and S, which stands for no key, comes last.
    positions = torch.cat(parts, dim=-1).sort(dim=-1).values
    is_new = positions < seq_len
    is_new[..., 1:] &= positions[..., 1:] != positions[..., :-1]
    K = int(is_new.sum(-1).max())
    # What stands for no key goes to column K, which is then left off.
    column = (is_new.cumsum(-1) - 1).masked_fill(positions == seq_len, K)
    distinct = positions.new_full((H, N, K + 1), -1).scatter_(-1, column, positions)
    counts = torch.zeros_like(distinct).scatter_add_(-1, column, torch.ones_like(column))
    return distinct[..., :K], counts[..., :K], zero_keys


def _checked_rows(rows: torch.Tensor | Sequence[int], seq_len: int) -> list[int]:
    """`rows` as a list of positions in [0, S)."""
    if isinstance(rows, torch.Tensor):
        if rows.dtype == torch.bool or rows.is_floating_point() or rows.is_complex():
            raise TypeError(f"rows has dtype {rows.dtype}; it must be an integer tensor.")
        if rows.dim() != 1:
            raise ValueError(
                f"rows has shape {tuple(rows.shape)}; it must have one dimension, an entry per row."
            )
        if rows.is_meta:
            raise ValueError("rows is on meta and holds no values; give it on the CPU.")
        chosen = cast(list[int], rows.tolist())
    elif isinstance(rows, Sequence) and not isinstance(rows, (str, bytes)):
        chosen = [check_integer("an entry of rows", row) for row in rows]
    else:
        raise TypeError(
            f"rows is a {type(rows).__name__}; it must be an integer tensor or a sequence of "
            f"integers, such as [0, 100]."
        )
    for row in chosen:
        if not 0 <= row < seq_len:
            raise ValueError(f"rows holds {row}; each must be in [0, S), here S = {seq_len}.")
    return chosen
