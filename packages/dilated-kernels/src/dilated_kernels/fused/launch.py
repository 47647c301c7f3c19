"""Grids, buffers and the order of launches: from tensors and a pattern to kernels.

One launch per branch, dilated branches first. Until the last launch a result is accumulated in one
float32 buffer; a last branch with r = 1 touches every row, so it writes the dtype of the inputs
itself and no pass over the result is left to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import triton
from dilated_core import AttentionOutput, DilatedPattern
from dilated_core.inputs import document_bounds

from dilated_kernels.fused import backward, forward
from dilated_kernels.fused.configs import Config, Kind, block_d, choose_config
from dilated_kernels.fused.tile_order import TileOrder, order_table

# To a type checker a kernel is a Python function, whose launch options it does not know.
_forward_kernel = cast(Any, forward.forward_kernel)
_delta_kernel = cast(Any, backward.delta_kernel)
_dq_kernel = cast(Any, backward.dq_kernel)
_dk_dv_kernel = cast(Any, backward.dk_dv_kernel)


class Options(NamedTuple):
    """What the kernels need to know besides tensors and pattern."""

    is_causal: bool
    scale: float
    dropout_p: float
    dropout_seed: int
    key_mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    tile_order: TileOrder


class Launch(NamedTuple):
    """One branch: its geometry on the given sequence or documents.

    Attributes:
        branch: Its index in the pattern.
        segment_length: w, clipped to the sequence.
        rate: r.
        num_segments: Segments per head and batch row.
        max_rows: The most rows that a head keeps in a segment.
        segments: With documents, int64 `(num_segments, 3)`: see `locate_rows`.
    """

    branch: int
    segment_length: int
    rate: int
    num_segments: int
    max_rows: int
    segments: torch.Tensor | None


def is_interpreted() -> bool:
    """Whether Triton interprets the kernels on the CPU, as `TRITON_INTERPRET=1` makes it."""
    return not isinstance(_forward_kernel, triton.JITFunction)


def plan_launches(
    pattern: DilatedPattern, seq_len: int, cu_seqlens: torch.Tensor | None
) -> list[Launch]:
    """The launches in their order: the highest dilation first, r = 1 last."""
    bounds = None if cu_seqlens is None else document_bounds(cu_seqlens, seq_len)
    launches: list[Launch] = []
    for branch, (w, r) in enumerate(pattern.branches):
        if bounds is None or cu_seqlens is None:
            w = min(w, seq_len)
            launches.append(Launch(branch, w, r, -(-seq_len // w), -(-w // r), None))
            continue
        rows = [
            (start, min(w, stop - start), min(w, last - first))
            for first, last in pairwise(bounds)
            for start, stop in ((s, last) for s in range(first, last, w))
        ]
        longest = max((length for _, length, _ in rows), default=1)
        table = torch.tensor(rows, dtype=torch.int64).to(cu_seqlens.device, non_blocking=True)
        launches.append(Launch(branch, w, r, len(rows), -(-longest // r), table))
    return sorted(launches, key=lambda launch: -launch.rate)


class Accumulation:
    """A result that the launches add to one after another.

    Args:
        like: Shape, dtype and device of the result.
        launches: In their order.
        is_read_unwritten: Whether a launch reads rows that none before it has written.
    """

    def __init__(
        self, like: torch.Tensor, launches: Sequence[Launch], *, is_read_unwritten: bool
    ) -> None:
        self._like = like
        self._last = len(launches) - 1
        self._is_completed = launches[-1].rate == 1
        self._partial = self._result = None
        if self._last or not self._is_completed:
            must_be_zero = is_read_unwritten or not self._is_completed
            new = like.new_zeros if must_be_zero else like.new_empty
            self._partial = new(like.shape, dtype=torch.float32)
        if self._is_completed:
            is_wide = like.dtype == torch.float32 and self._partial is not None
            self._result = self._partial if is_wide else like.new_empty(like.shape)

    def buffers(self, i: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What launch i reads, if anything, and where it writes."""
        is_final = i == self._last and self._is_completed
        return self._partial if i else None, self._result if is_final else self._partial

    def finish(self) -> torch.Tensor:
        """The result, once all launches are made."""
        if self._result is not None:
            return self._result
        assert self._partial is not None
        return self._partial.to(self._like.dtype)


def dilated_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: DilatedPattern, options: Options
) -> AttentionOutput:
    """Out `(B, S, H, D)` and lse `(B, S, H)` of the whole pattern."""
    q, k, v = map(_with_unit_stride, (q, k, v))
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    if q.numel() == 0:
        return AttentionOutput(q.new_empty(q.shape), lse)
    launches = plan_launches(pattern, q.shape[1], options.cu_seqlens)
    out = Accumulation(q, launches, is_read_unwritten=False)
    with _on_device(q):
        for i, launch in enumerate(launches):
            config = _config("forward", q, launch, options)
            tiles = -(-launch.max_rows // config.block_m)
            cells = tiles * launch.num_segments
            partial, destination = out.buffers(i)
            _forward_kernel[(cells * q.shape[0] * q.shape[2],)](
                *(q, k, v, options.key_mask, launch.segments),
                *(_order(options, launch, tiles, q), partial, destination, lse),
                *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_mask_strides(options)),
                *_geometry(q, k, pattern, launch, cells, tiles),
                *_numbers(options, launch),
                **_flags(q, pattern, options, config),
                WIDE=is_wide(config, launch, options, q, k, v),
                ATTENDED=pattern.padding == "attended",
                POSITIVE_SCALE=options.scale > 0,
            )
    return AttentionOutput(out.finish(), lse)


def dilated_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    pattern: DilatedPattern,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v; `out` and `lse` are those of a softmax over possibly more keys."""
    q, k, v, dout = map(_with_unit_stride, (q, k, v, dout))
    if q.numel() == 0:
        return q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    lse = lse.contiguous()
    launches = plan_launches(pattern, q.shape[1], options.cu_seqlens)
    with _on_device(q):
        shared = (dout, _row_values(dout, out.contiguous(), dlse, lse))
        dq = _dq(q, k, v, shared, launches, pattern, options)
        return dq, *_dk_dv(q, k, v, shared, launches, pattern, options)


_Shared = tuple[torch.Tensor, torch.Tensor]
"""dout, and what `delta_kernel` makes."""


def _row_values(
    dout: torch.Tensor, out: torch.Tensor, dlse: torch.Tensor | None, lse: torch.Tensor
) -> torch.Tensor:
    """See `delta_kernel`."""
    values = lse.new_empty(*lse.shape, 2)
    B, S, H, D = out.shape
    width = block_d(D)
    block_m = max(16, 4096 // width)
    blocks = -(-S // block_m)
    _delta_kernel[(B * blocks * H,)](
        *(dout, out, None if dlse is None else dlse.contiguous(), lse, values),
        *(*dout.stride()[:3], S, H, blocks),
        HEAD_DIM=D,
        BLOCK_M=block_m,
        BLOCK_D=width,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return values


def _dq(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shared: _Shared,
    launches: Sequence[Launch],
    pattern: DilatedPattern,
    options: Options,
) -> torch.Tensor:
    dq = Accumulation(q, launches, is_read_unwritten=len(launches) > 1)
    for i, launch in enumerate(launches):
        config = _config("dq", q, launch, options)
        tiles = -(-launch.max_rows // config.block_m)
        cells = tiles * launch.num_segments
        _dq_kernel[(cells * q.shape[0] * q.shape[2],)](
            *(q, k, v, options.key_mask, launch.segments),
            *(_order(options, launch, tiles, q), *shared, *dq.buffers(i)),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_mask_strides(options)),
            *shared[0].stride()[:3],
            *_geometry(q, k, pattern, launch, cells, tiles),
            *_numbers(options, launch),
            **_flags(q, pattern, options, config),
            WIDE=is_wide(config, launch, options, q, k, v, shared[0]),
        )
    return dq.finish()


def _dk_dv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shared: _Shared,
    launches: Sequence[Launch],
    pattern: DilatedPattern,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    dk, dv = (Accumulation(x, launches, is_read_unwritten=len(launches) > 1) for x in (k, v))
    for i, launch in enumerate(launches):
        config = _config("dk_dv", q, launch, options)
        tiles = -(-launch.max_rows // config.block_n)
        cells = tiles * launch.num_segments
        slots = count_slots(q.shape[2], k.shape[2], launch.rate, pattern)
        dk_partial, dk_destination = dk.buffers(i)
        dv_partial, dv_destination = dv.buffers(i)
        _dk_dv_kernel[(cells * k.shape[0] * k.shape[2] * slots,)](
            *(q, k, v, options.key_mask, launch.segments, _order(options, launch, tiles, q)),
            *(*shared, dk_partial, dv_partial, dk_destination, dv_destination),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_mask_strides(options)),
            *shared[0].stride()[:3],
            *_geometry(q, k, pattern, launch, cells, tiles),
            slots,
            *_numbers(options, launch),
            **_flags(q, pattern, options, config),
            WIDE=is_wide(config, launch, options, q, k, v, shared[0]),
        )
    return dk.finish(), dv.finish()


@lru_cache(maxsize=1024)
def count_slots(num_heads: int, num_kv_heads: int, rate: int, pattern: DilatedPattern) -> int:
    """The most offsets that heads of q with one head of k and v have: see `heads_of_slot`."""
    group = num_heads // num_kv_heads
    if pattern.head_offsets == "interleaved":
        return min(group, rate)
    run = -(-num_heads // rate)
    return max(((g + 1) * group - 1) // run - g * group // run + 1 for g in range(num_kv_heads))


def _config(kind: Kind, q: torch.Tensor, launch: Launch, options: Options) -> Config:
    return choose_config(
        *(kind, q.dtype, q.shape[3], q.device, launch.max_rows, dot_precision(q.dtype)),
        options.key_mask is not None or options.dropout_p > 0,
    )


def _geometry(
    q: torch.Tensor,
    k: torch.Tensor,
    pattern: DilatedPattern,
    launch: Launch,
    cells: int,
    tiles: int,
) -> tuple[int, ...]:
    _, S, H, _ = q.shape
    heads_per_offset = -(-H // launch.rate)
    return (
        *(S, H, H // k.shape[2], launch.segment_length, launch.rate, heads_per_offset),
        *(cells, tiles),
    )


def _numbers(options: Options, launch: Launch) -> tuple[float, float, int, int]:
    return options.scale, options.dropout_p, options.dropout_seed, launch.branch


def _flags(
    q: torch.Tensor, pattern: DilatedPattern, options: Options, config: Config
) -> dict[str, Any]:
    return {
        "HEAD_DIM": q.shape[3],
        "BLOCK_D": block_d(q.shape[3]),
        "IS_CAUSAL": options.is_causal,
        "BLOCKED": pattern.head_offsets == "blocked",
        "HAS_DROPOUT": options.dropout_p > 0,
        "PRECISION": dot_precision(q.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # Triton 3.9 warns unless it is told; multiply-adds are what the accuracy was checked with.
        "enable_fp_fusion": True,
    }


def is_wide(config: Config, launch: Launch, options: Options, *tensors: torch.Tensor) -> bool:
    """Whether rows of one tile can be 2³¹ elements apart, in any of these tensors or a result."""
    _, _, H, D = tensors[0].shape
    strides = [H * max(D, 2), _mask_strides(options)[1], *(x.stride(1) for x in tensors)]
    return max(config.block_m, config.block_n) * launch.rate * max(strides) >= 2**31


def dot_precision(dtype: torch.dtype) -> str:
    """How the kernels multiply matrices: true float32 unless PyTorch is told to use TF32."""
    if is_interpreted():
        return "upcast" if dtype == torch.bfloat16 else "ieee"
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def _order(options: Options, launch: Launch, tiles: int, q: torch.Tensor) -> torch.Tensor | None:
    return order_table(options.tile_order, launch.num_segments, tiles, q.device)


def _mask_strides(options: Options) -> tuple[int, int, int]:
    mask = options.key_mask
    if mask is None:
        return 0, 0, 0
    return mask.stride(0), mask.stride(1), mask.stride(2) if mask.dim() == 3 else 0


def _with_unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _on_device(x: torch.Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
