"""Bytes of a `GenerationCache`, to the byte."""

from __future__ import annotations

from typing import Any

import torch
from dilated_core import decoding_cache_nbytes

from dilated_models.longnet.size import DISTANCE_STEPS
from dilated_models.planning.adaptive import AdaptiveSizes
from dilated_models.planning.job import Job
from dilated_models.planning.kinds import attention_options, channels, has_bounded_cache

_FIRST_ROOM = 256  # tokens, of `KeyHistory`


def cache_bytes(job: Job) -> int:
    """Of a `GenerationCache` that holds the job's rows."""
    model, n = job.model, job.itemsize
    convolution = job.rows * max(0, model.key_conv - 1) * model.d_model * n
    memory = 0
    if job.memory_len is not None:  # of another text: all at once
        memory = _pairs_bytes(job, _room([job.memory_len]))
    elif job.has_cross:
        memory = _pairs_bytes(job, _room(_steps(job)))
    each = attention_cache_bytes(job) + convolution
    return job.num_blocks * each + model.num_decoder_layers * memory


def attention_cache_bytes(job: Job) -> int:
    """What one block keeps for its self-attention."""
    model = job.model
    if has_bounded_cache(model):
        dtype: torch.dtype = getattr(torch, job.dtype)
        return decoding_cache_nbytes(
            model.pattern,
            batch_size=job.rows,
            num_heads=model.nhead,
            num_kv_heads=model.num_kv_heads,
            head_dim=channels(model, job.dtype),
            dtype=dtype,
        )
    if model.attention_kind == "block_sparse_adaptive":
        return job.rows * _selection_bytes(job)
    room = _room(_steps(job))
    if model.attention_kind == "nsa":  # the inputs of all tokens
        return job.rows * room * model.d_model * job.itemsize
    return _pairs_bytes(job, room)


def _pairs_bytes(job: Job, room: int) -> int:
    """Keys and values of so many tokens of each text."""
    return 2 * job.rows * room * job.model.kv_dim * job.itemsize


def _steps(job: Job) -> list[int]:
    """Tokens of a text that come at a time."""
    whole, rest = divmod(job.seq_len, job.prompt_part)
    steps = [job.prompt_part] * whole + ([rest] if rest else [])
    # In decoding the new token comes alone, after the prompt.
    return [*steps, 1] if job.mode == "decoding" else steps


def _room(steps: list[int]) -> int:
    """Tokens of a text that `KeyHistory` has room for after these steps."""
    room, length = _FIRST_ROOM, 0
    for step in steps:
        length += step
        if length > room:
            room = max(length, 2 * room)
    return room


def _selection_bytes(job: Job) -> int:
    """Of a `dilated_sparse.AdaptiveCache` of one text, which `SelectionHistory` holds."""
    model, n = job.model, job.itemsize
    options: Any = attention_options(model)
    length = job.seq_len + (job.mode == "decoding")
    sizes = AdaptiveSizes.of(model, options, length)
    L, K = sizes.block_size, sizes.num_kv_heads
    room = 0
    for step, total in ((job.seq_len, job.seq_len), (1, length)):
        if total > room and step:
            room = max(total, 2 * room)
    recent = min(length, (length - 1) % L + 1 + L)
    queries = 2 * recent * model.d_model * n
    keys = 2 * (length % L) * model.kv_dim * n
    wide = max(4, n)
    blocks = length // L
    means = blocks * sizes.per_block * (K * sizes.head_dim + 1) * wide
    gate = K * sizes.per_block * blocks * (2 * sizes.gate_dim + DISTANCE_STEPS) * n
    kept = K * ((length - 1) // L if blocks else 0)  # bool
    return 2 * room * model.kv_dim * n + queries + keys + means + gate + kept
