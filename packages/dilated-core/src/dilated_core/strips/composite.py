"""Derivatives of dilated attention in elementary operations, for more than a plain backward.

Every function here may be differentiated, in forward or reverse mode, to any order, and mapped by
`torch.func.vmap`: rows are gathered and added by index instead of viewed, and nothing is written in
place. The scores of a problem are held as a whole, so memory grows with the keys that queries see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from dilated_core.backends.contract import Gradients
from dilated_core.inputs import read_document_bounds
from dilated_core.merge import accumulation_dtype
from dilated_core.strips.call import Call
from dilated_core.strips.documents import WHOLE, Sequences, group_documents
from dilated_core.strips.plan import Problem, Span, plan_problems
from dilated_core.strips.view import Rows

Tensors = tuple[torch.Tensor, ...]


def gradients(
    call: Call,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
) -> Gradients:
    """dq, dk, dv as `dilated_core.strips.call.backward` returns them, differentiable in all inputs.

    Args: As for that function. The result is differentiable in `out` and `lse` too: through them
    the chain rule reaches q, k and v once more, by the backward of the forward pass.
    """
    # ds = p · (dout·vᵀ − rowsum(dout · out) + dlse)
    shift = (dout.to(lse.dtype) * out).sum(-1)
    shift = shift if dlse is None else shift - dlse
    queries, keys = (dout, q, lse, shift), (k, v)

    def one(problem: Problem, queries: Tensors, keys: Tensors) -> tuple[Tensors, Tensors]:
        dout, q, lse, shift = queries
        k, v = keys
        p = _probabilities(call, problem, q, k, lse)
        ds = p * (_scores(dout, v) - shift.mT.unsqueeze(-1)) * call.options.scale
        return (_weighted(ds, k),), (_summed(ds, q, k), _summed(p, dout, k))

    (dq,), (dk, dv) = _over_problems(call, one, queries, keys, (q,), (k, v), cu_seqlens)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def tangents(
    call: Call,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tangents of out and lse from those of q, k and v.

    With p = exp(s − lse) over all keys of a query, lse' = Σ p·s' and out' = Σ p·(s'·v + v') −
    lse'·out: sums over the problems, whatever branch a key comes from.
    """

    def one(problem: Problem, queries: Tensors, keys: Tensors) -> tuple[Tensors, Tensors]:
        q, dq, lse = queries
        k, v, dk, dv = keys
        p = _probabilities(call, problem, q, k, lse)
        ps = p * (_scores(dq, k) + _scores(q, dk)) * call.options.scale
        return (_weighted(ps, v) + _weighted(p, dv), ps.sum(-1).mT), ()

    (sums, dlse), _ = _over_problems(
        call, one, (q, dq, lse), (k, v, dk, dv), (out, lse), (), cu_seqlens
    )
    return (sums - dlse.unsqueeze(-1) * out).to(out.dtype), dlse


_One = Callable[[Problem, Tensors, Tensors], tuple[Tensors, Tensors]]
"""From a problem and the rows of some tensors to rows of the results."""


def _over_problems(
    call: Call,
    one: _One,
    queries: Tensors,
    keys: Tensors,
    like_queries: Tensors,
    like_keys: Tensors,
    cu_seqlens: torch.Tensor | None,
) -> tuple[Tensors, Tensors]:
    """Σ over all problems of `one`, in tensors like those given, in the dtype to accumulate in."""
    mask = call.options.key_padding_mask
    if mask is not None:
        keys = tuple(x.masked_fill(mask[:, :, None, None], 0) for x in keys)
    first = like_queries[0]
    results, key_results = (
        [torch.zeros_like(x, dtype=accumulation_dtype(first.dtype)) for x in like]
        for like in (like_queries, like_keys)
    )
    for sequences in _sequences(cu_seqlens, first.shape[1]):
        query_parts, key_parts = (
            tuple(sequences.take(x) for x in tensors) for tensors in (queries, keys)
        )
        B, S = query_parts[0].shape[:2]
        for problem in plan_problems(
            call.pattern,
            queries=Span(0, S),
            keys=Span(0, S),
            seq_len=S,
            num_heads=first.shape[2],
            num_kv_heads=keys[0].shape[2],
            head_range=call.head_range,
            batch_size=B,
            is_causal=call.options.is_causal,
        ):
            if problem.keys.num_rows == 0:
                continue
            at, key_at = _index(problem.queries, first), _index(problem.keys, first)
            rows, key_rows = one(
                problem,
                tuple(_gather(x, at) for x in query_parts),
                tuple(_gather(x, key_at) for x in key_parts),
            )
            for totals, parts, where in ((results, rows, at), (key_results, key_rows, key_at)):
                totals[:] = [
                    _added(x, part, where, sequences) for x, part in zip(totals, parts, strict=True)
                ]
    if mask is not None:
        key_results = [x.masked_fill(mask[:, :, None, None], 0) for x in key_results]
    return tuple(results), tuple(key_results)


class _Index(NamedTuple):
    """Where the rows of a view are: int64 indices of batch, position and head, which broadcast."""

    batches: torch.Tensor
    positions: torch.Tensor
    heads: torch.Tensor
    shape: tuple[int, int, int]


def _index(rows: Rows, like: torch.Tensor) -> _Index:
    def numbers(count: int) -> torch.Tensor:
        return torch.arange(count, device=like.device)

    batches = rows.first_batch + numbers(rows.num_batches)
    segments = rows.segment_length * numbers(rows.num_segments)
    heads = numbers(rows.num_heads)
    positions = (
        rows.start
        + segments[:, None, None]
        + rows.rate * numbers(rows.num_rows)[:, None]
        + rows.offset_step * heads
    )
    return _Index(
        batches[:, None, None, None],
        positions,
        rows.first_head + rows.head_step * heads,
        (rows.num_problems, rows.num_rows, rows.num_heads),
    )


def _gather(x: torch.Tensor, at: _Index) -> torch.Tensor:
    """The rows as `Rows.view` returns them, in the dtype to accumulate in."""
    rows = x[at.batches, at.positions, at.heads].to(accumulation_dtype(x.dtype))
    return rows.reshape(*at.shape, *x.shape[3:])


def _added(x: torch.Tensor, part: torch.Tensor, at: _Index, sequences: Sequences) -> torch.Tensor:
    """`x` `(B, S, …)` with the rows of some of its sequences added to."""
    batches, positions = at.batches, at.positions
    if sequences.length:
        # Sequence b is a piece of batch row 0.
        starts = _starts(sequences, batches.device)[batches]
        batches, positions = torch.zeros_like(batches), positions + starts
    shape = (*(batches + positions + at.heads).shape, *x.shape[3:])
    index = (batches, positions, at.heads)
    return x.index_put(index, part.reshape(shape).to(x.dtype), accumulate=True)


def _starts(sequences: Sequences, device: torch.device) -> torch.Tensor:
    if sequences.index is not None:
        return sequences.index[:: sequences.length].to(device)
    return sequences.start + sequences.length * torch.arange(sequences.count, device=device)


def _sequences(cu_seqlens: torch.Tensor | None, num_positions: int) -> Iterator[Sequences]:
    if cu_seqlens is None:
        yield WHOLE
    else:
        yield from group_documents(read_document_bounds(cu_seqlens, num_positions))


def _probabilities(
    call: Call, problem: Problem, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor
) -> torch.Tensor:
    """exp(s − lse) `(B, H, M, N)`, 0 where a query does not see a key."""
    s = _scores(q, k) * call.options.scale
    hidden = torch.zeros(s.shape[-2:], dtype=torch.bool, device=s.device)
    if problem.is_causal:
        hidden = torch.ones_like(hidden).triu(1)
    if (mask := call.options.key_padding_mask) is not None:
        at = _index(problem.keys, s)
        # Every head of a position has the same mask.
        positions = at.positions + torch.zeros_like(at.heads)
        hidden_keys = mask[at.batches, positions].reshape(at.shape)
        group = problem.queries.num_heads // problem.keys.num_heads
        hidden = hidden | hidden_keys.mT.repeat_interleave(group, 1)[:, :, None, :]
    # A row without visible keys has lse −∞; all its scores are hidden.
    lse = lse.masked_fill(lse == -torch.inf, 0).mT.unsqueeze(-1)
    return (s.masked_fill(hidden, -torch.inf) - lse).exp()


def _scores(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a·bᵀ `(B, H, M, N)` of a `(B, M, H, D)` and b `(B, N, H_kv, D)`."""
    B, M, H, D = a.shape
    N, K = b.shape[1:3]
    # Every size is given: PyTorch cannot infer one in an empty tensor.
    rows = a.reshape(B, M, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, H // K * M, D)
    return (rows @ b.permute(0, 2, 3, 1)).reshape(B, H, M, N)


def _weighted(weights: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Σ over keys of weights `(B, H, M, N)` times b `(B, N, H_kv, D)`: `(B, M, H, D)`."""
    B, H, M, N = weights.shape
    K, D = b.shape[2:]
    rows = weights.reshape(B, K, H // K * M, N) @ b.transpose(1, 2)
    return rows.reshape(B, H, M, D).transpose(1, 2)


def _summed(weights: torch.Tensor, a: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Σ over queries of weights `(B, H, M, N)` times a `(B, M, H, D)`: `(B, N, H_kv, D)`."""
    B, H, M, N = weights.shape
    K = like.shape[2]
    rows = a.transpose(1, 2).reshape(B, K, H // K * M, a.shape[-1])
    return (weights.reshape(B, K, H // K * M, N).mT @ rows).transpose(1, 2)
