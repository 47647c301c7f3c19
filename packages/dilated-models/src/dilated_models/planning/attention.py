"""Attention of a block on one rank: what it computes, and what travels between ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

from dilated_core import DilatedPattern

from dilated_models.config import LongNetConfig
from dilated_models.planning.job import ITEMSIZES, Job
from dilated_models.planning.kinds import (
    Branch,
    Product,
    attention_options,
    branches_of,
    channels,
    has_bounded_cache,
    products_of,
)

BACKWARD_OVER_FORWARD = 2.5  # five matrix products instead of two


class Work(NamedTuple):
    """The attention of one block on the rank that has most to do, for the tokens of one part.

    Attributes:
        branches: What is computed.
        products: Matrix products beside these and the projections.
        sent_forward, sent_backward: Bytes that the rank sends to ranks that share its sequences.
        cross_forward, cross_backward: What a block with cross-attention sends beside these.
        received: Bytes of k and v of other ranks that it holds at once.
        hops: Steps in which rows travel in forward.
        balance: Mean over largest FLOPs of these ranks.
    """

    branches: tuple[Branch, ...]
    products: tuple[Product, ...] = ()
    sent_forward: int = 0
    sent_backward: int = 0
    cross_forward: int = 0
    cross_backward: int = 0
    received: int = 0
    hops: int = 0
    balance: float = 1.0

    @property
    def flops(self) -> float:
        """Of pairs of queries and keys, in forward."""
        return sum(branch.flops for branch in self.branches)


def work_of(job: Job) -> Work:
    """The attention of a block of the job's model; for `"decoding"` that of one token a row.

    Raises:
        ImportError: If the model or `cp` needs a package that is not installed.
        ValueError: If the attention cannot be spread over `cp` ranks.
    """
    model, learns = job.model, job.mode == "training"
    if job.mode == "decoding":
        return _of_one_token(job)
    if job.mode == "prefill":
        return _of_parts(job)
    branches = branches_of(model, job.seq_len, job.rows, job.dtype)
    if job.cp > 1:
        return _over_ranks(job, branches)
    return Work(branches, products_of(model, job.seq_len, job.rows, learns=learns))


def _of_one_token(job: Job) -> Work:
    model, rows = job.model, job.rows
    if model.attention_kind == "block_sparse_adaptive":
        from dilated_models.planning.adaptive import kept_blocks

        options = attention_options(model)
        num_blocks = job.seq_len // options.block_size + 1
        keys = float(kept_blocks(options, num_blocks) * options.block_size)
    elif not has_bounded_cache(model):  # `KeyHistory` attends from all tokens
        return Work(
            branches_of(model, job.seq_len + 1, rows, job.dtype),
            products_of(model, job.seq_len + 1, rows, learns=False),
        )
    else:
        keys = keys_of_last_query(model, job.seq_len)
    flops = 4.0 * rows * model.nhead * channels(model, job.dtype) * keys
    return Work((Branch(round(keys), flops, 1.0),))


def keys_of_last_query(model: LongNetConfig, seq_len: int) -> float:
    """Keys that the last token of a sequence sees in dilated attention, of a head in the mean."""
    return max(1.0, sum(min(w, seq_len) / r**2 for w, r in model.pattern.branches))


def _of_parts(job: Job) -> Work:
    """The mean of the parts of a prompt."""
    model, rows = job.model, job.rows
    parts = -(-job.seq_len // job.prompt_part)
    if has_bounded_cache(model):
        branches = branches_of(model, job.seq_len, rows, job.dtype)
        return Work(tuple(x._replace(flops=x.flops / parts) for x in branches))
    # `KeyHistory` attends from all tokens so far in each part.
    some = range(1, parts + 1, max(1, parts // 16))
    lengths = [min(job.seq_len, i * job.prompt_part) for i in some]
    works = [
        Work(
            branches_of(model, length, rows, job.dtype),
            products_of(model, length, rows, learns=False),
        )
        for length in lengths
    ]
    last, flops = works[-1], sum(work.flops for work in works) / len(works)
    share = flops / last.flops
    return Work(
        tuple(x._replace(flops=x.flops * share) for x in last.branches),
        tuple(x._replace(times=x.times * share) for x in last.products),
    )


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
    layout, exchange = job.spreading

    def exchanged(pattern: Any, block_size: int | None = None) -> Any:
        return exchange_plan(
            pattern, job.seq_len, job.cp, layout, exchange=exchange, num_heads=model.nhead,
            num_kv_heads=model.num_kv_heads, head_dim=channels(model, job.dtype),
            dtype=ITEMSIZES[job.dtype], batch_size=job.rows, is_causal=True, block_size=block_size,
        )  # fmt: skip

    if model.has_branches:
        plan = exchanged(model.pattern)
    else:  # the config has the blocks of each length
        options = attention_options(model)
        plan = exchanged(options, options.block_size)
    whole = sum(rank.forward_flops for rank in plan.ranks)
    most = max(rank.forward_flops for rank in plan.ranks) / whole
    forward = max(rank.forward_bytes for rank in plan.ranks)
    cross = _sent(exchanged(DilatedPattern([job.seq_len], [1])) if job.has_cross else None)
    # A ring holds the parcel that it computes with and the next one; the others hold all.
    at_once = min(1.0, 2 / max(1, plan.num_hops)) if exchange != "all_gather" else 1.0
    return Work(
        tuple(branch._replace(flops=branch.flops * most) for branch in branches),
        sent_forward=forward,
        sent_backward=_sent(plan)[1],
        cross_forward=cross[0],
        cross_backward=cross[1],
        received=round(at_once * max(forward, cross[0])),
        hops=plan.num_hops,
        balance=plan.balance,
    )


def _sent(plan: Any) -> tuple[int, int]:
    """What the rank sends that sends most, in forward and backward."""
    if plan is None:
        return 0, 0
    ranks = plan.ranks
    return max(x.forward_bytes for x in ranks), max(x.backward_bytes for x in ranks)
