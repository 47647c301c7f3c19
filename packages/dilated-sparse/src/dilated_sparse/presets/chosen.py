"""Attention of each query to its own block, causally, and to the earlier blocks it has chosen.

Shapes: B batch, S positions, H heads, K heads of k and v, D head_dim, G groups of heads that choose
together, N full blocks, n chosen blocks of a query.

The own blocks are causal squares, views that core attends to. The chosen blocks of all queries are
taken one place of the list at a time: a query has one block there, so the queries are sorted by
block, each block and its queries are a rectangle, rectangles of similar size are a batch, and
results merge into those of their queries in place. Memory is that of q, k, v and of one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from dilated_core import (
    AttentionBackend,
    AttentionOptions,
    AttentionOutput,
    DilatedPattern,
    Gradients,
    Problem,
    Span,
    fold_,
    plan_problems,
)
from dilated_core.dropout import DropoutRows, dropout_rows
from dilated_core.merge import accumulation_dtype
from dilated_core.strips.attend import attend, differentiate
from dilated_core.strips.view import is_batch_dense, viewable

from dilated_sparse.execution.run import gradients_through_lse, split
from dilated_sparse.execution.sequences import Part

# What one call of the backend copies; see `dilated_sparse.execution.plan`.
_COPIED_BYTES = 2**21
_COPIED_BYTES_GPU = 2**28


class Call(NamedTuple):
    """Everything that determines a call, apart from its tensors.

    Attributes:
        backend: Runs forward and backward.
        block_size: Positions of a block.
        options: Without a mask.
    """

    backend: AttentionBackend
    block_size: int
    options: AttentionOptions


def forward(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    choice: torch.Tensor,
    parts: list[Part],
) -> AttentionOutput:
    """Contiguous out `(B, S, H, D)` and lse `(B, S, H)`, not differentiable.

    Args:
        call: The options.
        q: `(B, S, H, D)`.
        k, v: `(B, S, K, D)`.
        choice: `(B, S, G, n)`, see `dilated_sparse.presets.choice`; K divides G, and G divides H.
        parts: The sequences, with blocks of their own. Elsewhere out is 0 and lse −∞.
    """
    out = q.new_zeros(q.shape)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=accumulation_dtype(q.dtype), device=q.device)
    options = _numbered(call.options, q)
    for part in parts:
        at = (part.rows, part.span)
        blocks = _Blocks.of(call, q[at], k[at], v[at], choice[at])
        here = _at(options, at)
        own = attend(blocks.own, blocks.q, blocks.k, blocks.v, here, backend=call.backend)
        into = AttentionOutput(own.out.to(own.lse.dtype), own.lse.contiguous())
        merged = blocks.grouped(into.out), into.lse.view(-1, blocks.heads)
        for batch in blocks.batches():
            tensors = (batch.take(blocks.rows), *blocks.keys(batch))
            result = call.backend.forward(*tensors, blocks.options(batch, here))
            rows = AttentionOutput(*(x[batch.rows] for x in merged))
            fold_(rows, AttentionOutput(*(x[batch.is_query] for x in result)))
            for x, row in zip(merged, rows, strict=True):
                x[batch.rows] = row
        out[at], lse[at] = into.out.to(out.dtype), into.lse
    return AttentionOutput(out, lse)


def backward(
    call: Call,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    choice: torch.Tensor,
    parts: list[Part],
) -> Gradients:
    """Contiguous gradients of q, k, v from those of out and, unless None, of lse."""
    grads = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    options, backend = _numbered(call.options, q), call.backend
    for part in parts:
        at = (part.rows, part.span)
        blocks = _Blocks.of(call, q[at], k[at], v[at], choice[at])
        dout_, out_, lse_ = (x[at].contiguous() for x in (dout, out, lse))
        dlse_ = None if dlse is None else dlse[at].contiguous()
        here = _at(options, at)
        delta = (dout_.to(lse.dtype) * out_.to(lse.dtype)).sum(-1)
        dq, dk, dv = differentiate(
            *(blocks.own, dout_, blocks.q, blocks.k, blocks.v, out_, lse_, here),
            backend=backend,
            delta=delta,
            dlse=dlse_,
        )
        dq = dq.to(lse.dtype).contiguous()
        sums = blocks.grouped(dq)
        dk_blocks, dv_blocks = (torch.zeros_like(blocks.k_blocks, dtype=lse.dtype) for _ in "kv")
        rows = [blocks.grouped(x) for x in (dout_, out_)]
        numbers = [None if x is None else x.view(-1, blocks.heads) for x in (lse_, delta, dlse_)]
        for batch in blocks.batches():
            q_rows, out_rows = batch.take(blocks.rows), batch.take(rows[1])
            # Copies of a query that fill a rectangle have probability 0 and gradient 0.
            dout_rows = batch.take(rows[0]) * batch.is_query[..., None, None]
            lse_rows, delta_rows, dlse_rows = (
                None if x is None else batch.take(x) for x in numbers
            )
            assert lse_rows is not None
            lse_rows = lse_rows.masked_fill(~batch.is_query[..., None], torch.inf)
            k_rows, v_rows = blocks.keys(batch)
            tensors = (dout_rows, q_rows, k_rows, v_rows, out_rows, lse_rows)
            batch_options = blocks.options(batch, here)
            dq_rows, dk_rows, dv_rows = backend.backward(*tensors, batch_options, delta=delta_rows)
            if dlse_rows is not None:
                more = gradients_through_lse(
                    backend, batch_options, dlse_rows, q_rows, k_rows, lse_rows
                )
                dq_rows, dk_rows = dq_rows + more[0], dk_rows + more[1]
            sums[batch.rows] += dq_rows[batch.is_query].to(sums.dtype)
            for total, more in ((dk_blocks, dk_rows), (dv_blocks, dv_rows)):
                total.index_add_(0, batch.blocks, more.squeeze(2).to(total.dtype))
        grads[0][at] = dq
        for grad, own, chosen in ((grads[1], dk, dk_blocks), (grads[2], dv, dv_blocks)):
            grad[at] = blocks.add_blocks(own, chosen)
    return grads[0], grads[1], grads[2]


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Blocks, each with as many rows of queries; the last rows of a block may be copies.

    Attributes:
        blocks: `(m,)` int64, numbers of blocks as in `_Blocks.k_blocks`.
        index: `(m, M)` int64, the rows of queries of each, as in `_Blocks.rows`.
        is_query: `(m, M)` bool, False for copies.
        rows: int64, the rows that are no copies, in their order.
    """

    blocks: torch.Tensor
    index: torch.Tensor
    is_query: torch.Tensor
    rows: torch.Tensor

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """These rows of x `(B·S·G, …)`: `(m, M, …)`."""
        return x[self.index]


@dataclass(frozen=True, slots=True, eq=False)
class _Blocks:
    """The tensors of sequences of one length, as blocks and as rows of queries.

    Attributes:
        q: `(B, S, H, D)`.
        k, v: `(B, S, K, D)`.
        choice: `(B, S, G, n)`.
        k_blocks, v_blocks: `(B·K·N, block_size, D)`, the full blocks of k and v.
        own: What core attends to for the own blocks.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    choice: torch.Tensor
    k_blocks: torch.Tensor
    v_blocks: torch.Tensor
    own: tuple[Problem, ...]

    @classmethod
    def of(
        cls,
        call: Call,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        choice: torch.Tensor,
    ) -> _Blocks:
        q, k, v = q.contiguous(), viewable(k), viewable(v)
        B, S, H, _ = q.shape
        everything = Span(0, S)
        own = plan_problems(
            DilatedPattern([call.block_size], [1]),
            queries=everything,
            keys=everything,
            seq_len=S,
            num_heads=H,
            num_kv_heads=k.shape[2],
            batch_size=B,
            is_causal=True,
            is_batch_dense=is_batch_dense(q, k, v),
        )
        blocks = [_full_blocks(x, call.block_size) for x in (k, v)]
        return cls(q, k, v, choice, blocks[0], blocks[1], own)

    @property
    def heads(self) -> int:
        """Heads of q that choose together."""
        return self.q.shape[2] // self.choice.shape[2]

    @property
    def rows(self) -> torch.Tensor:
        """The rows of q, see `grouped`."""
        return self.grouped(self.q)

    def grouped(self, x: torch.Tensor) -> torch.Tensor:
        """Contiguous x `(B, S, H, D)` as rows that choose together: `(B·S·G, heads, D)`."""
        return x.view(-1, self.heads, x.shape[-1])

    def keys(self, batch: _Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a batch: `(m, block_size, 1, D)` each."""
        k, v = (x[batch.blocks].unsqueeze(2) for x in (self.k_blocks, self.v_blocks))
        return k, v

    def options(self, batch: _Batch, options: AttentionOptions) -> AttentionOptions:
        """The options for a batch; what is dropped depends on positions."""
        if (rows := options.dropout_rows) is None:
            return options
        queries = batch.take(rows.queries.reshape(-1, self.heads))
        K = self.k.shape[2]
        keys = rows.keys[:, :, None, None].expand(-1, -1, K, -1)
        keys = _full_blocks(keys, self.k_blocks.shape[1])[batch.blocks]
        return options._replace(dropout_rows=DropoutRows(queries, keys))

    def add_blocks(self, grad: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """`grad` `(B, S, K, D)` and the gradients of the full blocks, added up."""
        B, _, K, D = self.k.shape
        size = blocks.shape[1]
        rows = blocks.view(B, K, -1, size, D).permute(0, 2, 3, 1, 4).flatten(1, 2)
        grad = grad.to(blocks.dtype)
        return torch.cat([grad[:, : rows.shape[1]] + rows, grad[:, rows.shape[1] :]], 1)

    def batches(self) -> Iterator[_Batch]:
        """Every query with each block it has chosen, exactly once.

        No query is twice in a batch.
        """
        B, S, G, n = self.choice.shape
        K, size, D = self.k.shape[2], self.k_blocks.shape[1], self.k.shape[3]
        N = S // size
        is_cpu = self.q.device.type == "cpu"
        limit = (_COPIED_BYTES if is_cpu else _COPIED_BYTES_GPU) // (D * self.k.element_size())
        groups = torch.arange(B * G, device=self.choice.device).view(B, 1, G)
        for place in range(n):
            block = self.choice[..., place]
            # A list of queries for each block and group of heads.
            lists = (groups * N + block).flatten()
            queries = (block >= 0).flatten().nonzero()[:, 0]
            lists, order = lists[queries].sort(stable=True)
            queries = queries[order]
            numbers, counts = _runs(lists)
            starts = counts.cumsum(0) - counts
            counts, order = counts.sort(descending=True, stable=True)
            numbers, starts = numbers[order], starts[order]
            group, block = numbers // N, numbers % N
            blocks = (group // G * K + group % G // (G // K)) * N + block
            for first, last in _batches_of(counts, limit, 2 * size, self.heads):
                lengths = counts[first:last, None]
                places = torch.arange(int(lengths[0]), device=counts.device)
                is_query = places < lengths
                index = queries[starts[first:last, None] + places.minimum(lengths - 1)]
                yield _Batch(blocks[first:last], index, is_query, index[is_query])


def _runs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of sorted x, and how often each of them occurs."""
    values, counts = torch.unique_consecutive(x, return_counts=True)  # pyright: ignore
    return cast("tuple[torch.Tensor, torch.Tensor]", (values, counts))


def _batches_of(
    counts: torch.Tensor, limit: int, num_keys: int, heads: int
) -> Iterator[tuple[int, int]]:
    """Cut descending lengths into ranges: few copies in each, and at most `limit` rows."""
    lengths = cast("list[int]", counts.tolist())  # pyright: ignore
    first = 0
    while first < len(lengths):
        longest = lengths[first]
        last = first + 1
        most = first + max(1, limit // (num_keys + 3 * longest * heads))
        while last < min(most, len(lengths)) and lengths[last] * 4 >= longest * 3:
            last += 1
        yield first, last
        first = last


def _full_blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """The full blocks of x `(B, S, K, D)`: `(B·K·N, size, D)`."""
    N = x.shape[1] // size
    blocks = split(x[:, : N * size], 1, (N, size))
    return blocks.permute(0, 3, 1, 2, 4).flatten(0, 2)


def _numbered(options: AttentionOptions, q: torch.Tensor) -> AttentionOptions:
    """The options with the numbers of all queries and keys by which a call drops, if it does."""
    if not options.dropout_p:
        return options
    return options._replace(dropout_rows=dropout_rows(options.dropout_seed, q).of_heads())


def _at(options: AttentionOptions, at: tuple[slice, slice]) -> AttentionOptions:
    """The options for some sequences."""
    if (rows := options.dropout_rows) is None:
        return options
    return options._replace(dropout_rows=DropoutRows(rows.queries[at], rows.keys[at]))
