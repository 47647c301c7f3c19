"""Attention of a block on one rank: FLOPs by branch, and what travels between ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from dilated_core import DilatedPattern

from dilated_models.config import LongNetConfig
from dilated_models.layers.position_codes import alibi_head_dim
from dilated_models.planning.job import ITEMSIZES, Job

BACKWARD_OVER_FORWARD = 2.5  # five matrix products instead of two


def channels(model: LongNetConfig, dtype: str) -> int:
    """Channels of a head of q, k and v: ALiBi adds some to those of the model."""
    if model.positions != "alibi":
        return model.head_dim
    return alibi_head_dim(model.head_dim, getattr(torch, dtype))


class Branch(NamedTuple):
    """Attention within segments of equal length.

    Attributes:
        rows: Rows of a segment that attend to one another.
        flops: In forward, of a rank.
        share: Share of all rows that the branch keeps.
    """

    rows: int
    flops: float
    share: float


class Work(NamedTuple):
    """The attention of one block on the rank that has most to do, for the tokens of one part.

    Attributes:
        branches: What is computed.
        sent_forward, sent_backward: Bytes that the rank sends to ranks that share its sequences.
        received: Bytes of k and v of other ranks that it holds at once.
        hops: Steps in which rows travel in forward.
        balance: Mean over largest FLOPs of these ranks.
    """

    branches: tuple[Branch, ...]
    sent_forward: int = 0
    sent_backward: int = 0
    received: int = 0
    hops: int = 0
    balance: float = 1.0

    @property
    def flops(self) -> float:
        """In forward."""
        return sum(branch.flops for branch in self.branches)


def work_of(job: Job) -> Work:
    """The attention of a block of the job's model; for `"decoding"` that of one token a row.

    Raises:
        ImportError: If the model or `cp` needs a package that is not installed.
        ValueError: If the attention cannot be spread over `cp` ranks.
    """
    model = job.model
    if job.mode == "decoding":
        if model.attention_kind != "dilated":  # `KeyHistory` attends from all tokens
            return Work(_branches(model, job.seq_len + 1, job.rows, job.dtype))
        keys = keys_of_last_query(model, job.seq_len)
        flops = 4.0 * job.rows * model.nhead * channels(model, job.dtype) * keys
        return Work((Branch(round(keys), flops, 1.0),))
    branches = _branches(model, job.seq_len, job.rows, job.dtype)
    if job.mode == "prefill":
        branches = _of_parts(job, branches)
    return Work(branches) if job.cp == 1 else _over_ranks(job, branches)


def keys_of_last_query(model: LongNetConfig, seq_len: int) -> float:
    """Keys that the last token of a sequence sees in dilated attention, of a head in the mean."""
    return max(1.0, sum(min(w, seq_len) / r**2 for w, r in model.pattern.branches))


def _of_parts(job: Job, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
    """The mean of the parts of a prompt."""
    parts = -(-job.seq_len // job.prompt_part)
    if job.model.attention_kind == "dilated":
        return tuple(x._replace(flops=x.flops / parts) for x in branches)
    # `KeyHistory` attends from all tokens so far in each part.
    some = range(1, parts + 1, max(1, parts // 16))
    lengths = [min(job.seq_len, i * job.prompt_part) for i in some]
    sums = [_branches(job.model, length, job.rows, job.dtype) for length in lengths]
    flops = sum(branch.flops for found in sums for branch in found) / len(sums)
    return (branches[0]._replace(flops=flops),)


def dense_branches(
    model: LongNetConfig, seq_len: int, rows: int, *, head_dim: int
) -> tuple[Branch, ...]:
    """Causal attention to all keys."""
    return _of_pattern(model, DilatedPattern([seq_len], [1]), seq_len, rows, head_dim)


def _branches(model: LongNetConfig, seq_len: int, rows: int, dtype: str) -> tuple[Branch, ...]:
    if model.attention_kind == "dilated":
        head_dim = channels(model, dtype)
        branches = _of_pattern(model, model.pattern, seq_len, rows, head_dim)
        if window := min(model.local_window, seq_len):
            pairs = seq_len * window - window * (window - 1) // 2
            branches += (Branch(window, _flops(model, rows, pairs), 1.0),)
        return branches
    if model.attention_kind == "moba":
        return _of_moba(model, seq_len, rows)
    return _of_blocks(model, seq_len, rows)


def _flops(model: LongNetConfig, rows: int, pairs: float) -> float:
    """Of pairs of query and key of each head, of each of `rows` sequences."""
    return 4.0 * rows * model.nhead * model.head_dim * pairs


def _of_pattern(
    model: LongNetConfig, pattern: DilatedPattern, seq_len: int, rows: int, head_dim: int
) -> tuple[Branch, ...]:
    branches: list[Branch] = []
    for w, r in pattern.branches:
        alone = DilatedPattern([w], [r], head_offsets=pattern.head_offsets)
        flops = alone.flops(seq_len, model.nhead, head_dim, batch_size=rows, is_causal=True)
        kept = max(1, min(w, seq_len) // r)
        branches.append(Branch(kept, flops, min(1.0, 1 / r)))
    return tuple(branches)


def _of_blocks(model: LongNetConfig, seq_len: int, rows: int) -> tuple[Branch, ...]:
    from dilated_sparse.pattern.ratio import row_budget

    options: Any = model.build_attention().config
    size, ratio = options.block_size, options.sparsity_ratio
    num_blocks = -(-seq_len // size)
    # Exact for the first rows; with many blocks the rounding of a row's budget does not count.
    exact = min(num_blocks, 4096)
    kept = sum(row_budget(ratio, row, num_blocks, True) - 1 for row in range(exact))
    kept += ratio * (num_blocks * (num_blocks + 1) - exact * (exact + 1)) / 2
    pairs = kept * size * size + seq_len * (min(size, seq_len) + 1) / 2
    pairs = min(pairs, seq_len * (seq_len + 1) / 2)
    return (Branch(size, _flops(model, rows, pairs), 1.0),)


def _of_moba(model: LongNetConfig, seq_len: int, rows: int) -> tuple[Branch, ...]:
    options: Any = model.build_attention().config
    size, topk = options.block_size, options.topk
    num_blocks = -(-seq_len // size)
    tail = seq_len - (num_blocks - 1) * size
    own = (num_blocks - 1) * size * (size + 1) // 2 + tail * (tail + 1) // 2
    # A query in block b sees min(topk − 1, b) whole blocks before its own one.
    few = min(topk - 1, num_blocks)
    earlier = few * (few - 1) // 2 + (topk - 1) * max(0, num_blocks - few)
    of_tail = min(topk - 1, num_blocks - 1)
    pairs = own + (earlier - of_tail) * size * size + of_tail * size * tail
    # Scores of all queries with the mean key of each earlier block: one product instead of two.
    scores = seq_len * (num_blocks - 1) / 4
    return (Branch(size, _flops(model, rows, pairs + scores), 1.0),)


def _over_ranks(job: Job, branches: tuple[Branch, ...]) -> Work:
    """What the rank with most FLOPs computes, and what the rank that sends most sends."""
    try:
        from dilated_ring import exchange_plan
    except ModuleNotFoundError as error:
        raise ImportError(
            f"cp needs dilated-ring, and {error.name} is not installed: "
            f"pip install 'dilated-models[ring]'"
        ) from error
    model = job.model
    pattern: Any = model.pattern if model.attention_kind == "dilated" else None
    block_size = None
    if pattern is None:
        pattern = model.build_attention().config
        block_size = pattern.block_size
    plan = exchange_plan(
        pattern, job.seq_len, job.cp, job.layout, exchange=job.exchange,
        num_heads=model.nhead, num_kv_heads=model.num_kv_heads, head_dim=channels(model, job.dtype),
        dtype=ITEMSIZES[job.dtype],
        batch_size=job.rows, is_causal=True, block_size=block_size,
    )  # fmt: skip
    whole = sum(rank.forward_flops for rank in plan.ranks)
    most = max(rank.forward_flops for rank in plan.ranks) / whole
    forward = max(rank.forward_bytes for rank in plan.ranks)
    # A ring holds the parcel that it computes with and the next one; the others hold all.
    at_once = min(1.0, 2 / max(1, plan.num_hops)) if job.exchange != "all_gather" else 1.0
    return Work(
        tuple(branch._replace(flops=branch.flops * most) for branch in branches),
        sent_forward=forward,
        sent_backward=max(rank.backward_bytes for rank in plan.ranks),
        received=round(at_once * forward),
        hops=plan.num_hops,
        balance=plan.balance,
    )
