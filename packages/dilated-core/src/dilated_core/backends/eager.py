"""Backend `eager`: matrix product, softmax, matrix product; any device, any floating dtype.

Suffixes: B batch, K heads of k and v, G heads of q that share one of them, M rows of q, N rows of k
and v, D head_dim.
"""

from __future__ import annotations

import torch

from dilated_core.backends.cache_layout import CacheLayout
from dilated_core.backends.contract import (
    CONTRACT_VERSION,
    AttentionInputs,
    AttentionOptions,
    Gradients,
)
from dilated_core.backends.eager_decoding import append_tokens, attend_newest
from dilated_core.dropout import DropoutRows, dropped, dropped_bytes, key_numbers, query_numbers
from dilated_core.merge import AttentionOutput, accumulation_dtype

# Scores held at once. 2^24 float32 are 64 MiB: large enough for full-speed products, small beside
# the inputs of any sequence whose scores exceed it.
_MAX_SCORES = 2**24

# Scores held at once, for each number in q: so that a small call takes little memory.
_SCORES_PER_ELEMENT = 4


class EagerBackend:
    """Plain attention from PyTorch's elementary operations, a tile of queries at a time."""

    name = "eager"
    priority = 0
    contract = CONTRACT_VERSION

    def why_not(self, inputs: AttentionInputs) -> list[str]:
        """See `AttentionBackend.why_not`."""
        if not inputs.dtype.is_floating_point:
            dtype = str(inputs.dtype).removeprefix("torch.")
            return [f"the dtype is {dtype}; it takes any floating dtype."]
        return []

    def workspace_bytes(
        self, inputs: AttentionInputs, num_problems: int, num_queries: int, num_keys: int
    ) -> int:
        """See `BoundedWorkspaceBackend`."""
        H, D = inputs.num_heads, inputs.head_dim
        rows = num_problems * num_queries * H
        kv_rows = num_problems * num_keys * (inputs.num_kv_heads or H)
        itemsize = accumulation_dtype(inputs.dtype).itemsize
        tile = _rows_per_tile(num_problems * H, num_queries, num_keys, D)
        tile_scores = num_problems * H * tile * num_keys
        dropout = 0
        if inputs.dropout_p:
            tile_rows = num_problems * H * tile
            dropout = dropped_bytes(tile_scores, tile_rows) + 4 * (rows + kv_rows)
        # q, k and v in the dtype to accumulate in; out in that dtype and a tile of it; three
        # numbers per row; scores, what of them is dropped, and a causal mask.
        return (
            itemsize * (3 * rows * D + 2 * kv_rows * D + 3 * rows + tile_scores)
            + dropout
            + 2 * tile * (num_keys + num_problems * H)
        )

    def takes_earlier_keys(self, device: torch.device) -> bool:
        """See `EarlierKeysBackend`."""
        return True

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions
    ) -> AttentionOutput:
        """See `AttentionBackend.forward`."""
        G = q.shape[2] // k.shape[2]
        wide = accumulation_dtype(q.dtype)
        out, lse = q.new_empty(q.shape, dtype=wide), q.new_empty(q.shape[:-1], dtype=wide)
        q_BKGMD, out_BKGMD = _grouped(q, G), _grouped(out, G)
        k_BKND, v_BKND = _contiguous(k), _contiguous(v)
        lse_BKGM = _grouped(lse.unsqueeze(-1), G).squeeze(-1)
        numbers = _dropout_numbers(q, k, options)
        for rows in _row_tiles(q_BKGMD, k.shape[1]):
            p = _scores(q_BKGMD, k_BKND, rows, options)
            # A row without any key has the maximum −inf, and −inf − −inf is NaN.
            largest = p.amax(-1, keepdim=True)
            largest.masked_fill_(largest == -torch.inf, 0)
            total = p.sub_(largest).exp_().sum(-1, keepdim=True)
            lse_BKGM[..., rows] = (total.log() + largest).squeeze(-1)
            if numbers is not None:
                p.masked_fill_(_dropped(numbers, rows, p.shape[-1], options), 0)
                total.mul_(1 - options.dropout_p)
            tile = _matmul(p, v_BKND[..., : p.shape[-1], :])
            # Normalised after the product: p itself rounds less than p divided by its sum.
            out_BKGMD[..., rows, :] = tile.div_(total.masked_fill_(total == 0, 1))
        return AttentionOutput(out.to(q.dtype), lse)

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        options: AttentionOptions,
        *,
        delta: torch.Tensor | None = None,
    ) -> Gradients:
        """See `AttentionBackend.backward`."""
        G = q.shape[2] // k.shape[2]
        dout_BKGMD, q_BKGMD = _grouped(dout, G), _grouped(q, G)
        k_BKND, v_BKND = _contiguous(k), _contiguous(v)
        if delta is None:
            delta = (dout * out.to(accumulation_dtype(out.dtype))).sum(-1)
        # A row without any finite score: exp(−inf − inf) is 0, where exp(−inf + inf) would be NaN.
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        delta_BKGM1, lse_BKGM1 = _grouped(delta.unsqueeze(-1), G), _grouped(lse.unsqueeze(-1), G)
        dq = torch.empty_like(q_BKGMD)
        dk, dv = torch.zeros_like(k_BKND), torch.zeros_like(v_BKND)
        numbers = _dropout_numbers(q, k, options)
        for rows in _row_tiles(q_BKGMD, k.shape[1]):
            s = _scores(q_BKGMD, k_BKND, rows, options)
            keys = slice(s.shape[-1])
            p = s.sub_(lse_BKGM1[..., rows, :]).exp_()
            ds = _matmul(dout_BKGMD[..., rows, :], v_BKND[..., keys, :].mT)
            kept = p
            if numbers is not None:
                mask = _dropped(numbers, rows, s.shape[-1], options)
                kept = p.div(1 - options.dropout_p).masked_fill_(mask, 0)
                ds.div_(1 - options.dropout_p).masked_fill_(mask, 0)
            dv[..., keys, :] += _sum_over_group(kept, dout_BKGMD[..., rows, :])
            ds.sub_(delta_BKGM1[..., rows, :]).mul_(p).mul_(options.scale)
            dq[..., rows, :] = _matmul(ds, k_BKND[..., keys, :])
            dk[..., keys, :] += _sum_over_group(ds, q_BKGMD[..., rows, :])
        return (
            dq.flatten(1, 2).transpose(1, 2).to(q.dtype),
            dk.transpose(1, 2).to(k.dtype),
            dv.transpose(1, 2).to(v.dtype),
        )

    def decode_forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layout: CacheLayout,
        *,
        position: int,
        scale: float,
    ) -> AttentionOutput:
        """See `DecodingBackend`."""
        append_tokens(k, v, keys, values, layout, position)
        return attend_newest(q, keys, values, layout, position=position, scale=scale)


def _grouped(x: torch.Tensor, group: int) -> torch.Tensor:
    """`(B, M, H, D)` -> `(B, K, G, M, D)` in the dtype to accumulate in: at least float32.

    A view of x, unless the dtype changes.
    """
    x = x.to(accumulation_dtype(x.dtype))
    B, M, H, D = x.shape
    # A size is split, so this is always a view.
    return x.view(B, M, H // group, group, D).permute(0, 2, 3, 1, 4)


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    """`(B, N, K, D)` -> contiguous `(B, K, N, D)` in the dtype to accumulate in.

    Copied once here: `matmul` would copy a strided matrix at each of its calls.
    """
    x = x.transpose(1, 2)
    return torch.empty(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device).copy_(x)


def _matmul(a_BKGMN: torch.Tensor, b_BKND: torch.Tensor) -> torch.Tensor:
    """Return a @ b, with the rows of a group as rows of one product, so that b is not repeated."""
    B, K, G, M, N = a_BKGMN.shape
    return (a_BKGMN.reshape(B, K, G * M, N) @ b_BKND).view(B, K, G, M, -1)


def _sum_over_group(a_BKGMN: torch.Tensor, b_BKGMD: torch.Tensor) -> torch.Tensor:
    """Σ over the group of aᵀ @ b: `(B, K, N, D)`."""
    return a_BKGMN.flatten(2, 3).mT @ b_BKGMD.flatten(2, 3)


def _dropout_numbers(
    q: torch.Tensor, k: torch.Tensor, options: AttentionOptions
) -> DropoutRows | None:
    """The numbers of queries `(B, K, G, M)` and keys `(B, K, 1, N)`; None without dropout."""
    if not options.dropout_p:
        return None
    (B, M, H, _), (N, K) = q.shape, k.shape[1:3]
    if (rows := options.dropout_rows) is None:
        seed = options.dropout_seed
        # Heads are numbered as if they were rows of the batch.
        queries = query_numbers(seed, B * H, 0, M, q.device).view(B, H, M).transpose(1, 2)
        rows = DropoutRows(queries, key_numbers(seed, B * K, 0, N, k.device).view(B, K, N).mT)
    queries = rows.queries.view(B, M, K, H // K).permute(0, 2, 3, 1)
    return DropoutRows(queries, rows.keys.transpose(1, 2).unsqueeze(2))


def _dropped(
    numbers: DropoutRows, rows: slice, num_keys: int, options: AttentionOptions
) -> torch.Tensor:
    queries, keys = numbers.queries[..., rows], numbers.keys[..., :num_keys]
    return dropped(queries, keys, options.dropout_p)


def _rows_per_tile(num_heads: int, num_queries: int, num_keys: int, head_dim: int) -> int:
    """Queries whose scores are held at once, for `num_heads` heads of all problems together."""
    scores = min(_MAX_SCORES, _SCORES_PER_ELEMENT * num_heads * num_queries * head_dim)
    return min(num_queries, max(1, scores // max(1, num_heads * num_keys)))


def _row_tiles(q_BKGMD: torch.Tensor, num_keys: int) -> list[slice]:
    B, K, G, M, D = q_BKGMD.shape
    step = max(1, _rows_per_tile(B * K * G, M, num_keys, D))
    return [slice(start, min(start + step, M)) for start in range(0, M, step)]


def _scores(
    q_BKGMD: torch.Tensor, k_BKND: torch.Tensor, rows: slice, options: AttentionOptions
) -> torch.Tensor:
    """Scaled scores of a tile of queries; when causal, only over keys up to the tile's last row."""
    earlier = k_BKND.shape[2] - q_BKGMD.shape[3]
    keys = rows.stop + earlier if options.is_causal else k_BKND.shape[2]
    # Scaled after the product: a scaled q would be rounded before it.
    s = _matmul(q_BKGMD[..., rows, :], k_BKND[..., :keys, :].mT).mul_(options.scale)
    if options.is_causal:
        ahead = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device)
        s.masked_fill_(ahead.triu_(rows.start + earlier + 1), -torch.inf)
    if (mask := options.key_padding_mask) is not None:
        s.masked_fill_(mask[:, :keys].transpose(1, 2)[:, :, None, None], -torch.inf)
    return s
