"""Forward and backward of the whole pattern: from tensors and a pattern to launches and results.

One launch per branch, dilated branches first. Until the last launch a result is accumulated in one
float32 buffer; a last branch with r = 1 touches every row, so its launch writes the dtype of the
inputs and no further pass over the result is needed.

Functions named `..._launches` compute launches and run none. Their arguments include the buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from dilated_core import AttentionOutput, DilatedPattern

from dilated_kernels.fused import backward, forward
from dilated_kernels.fused.branches import PlacedBranch, count_slots, place_branches
from dilated_kernels.fused.configs import block_d, choose_config
from dilated_kernels.fused.launch import Launch, dot_precision, run
from dilated_kernels.fused.tile_order import TileOrder, order_table
from dilated_kernels.fused.tuning import Config, Kind, Tuning


class Options(NamedTuple):
    """What a call has besides tensors and pattern.

    Attributes:
        key_padding_mask: bool `(B, S)` or `(B, S, H_kv)`, True for keys to ignore; or None.
    """

    is_causal: bool
    scale: float
    dropout_p: float
    dropout_seed: int
    key_padding_mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None


class Call(NamedTuple):
    """What all launches of one call share; tensors have stride 1 in the last dimension."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    pattern: DilatedPattern
    options: Options
    tuning: Tuning
    branches: list[PlacedBranch]


def make_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: DilatedPattern,
    options: Options,
    tuning: Tuning,
) -> Call:
    """The call with its branches placed and its tensors as the kernels read them."""
    q, k, v = map(_with_unit_stride, (q, k, v))
    branches = place_branches(pattern, q.shape[1], options.cu_seqlens)
    return Call(q, k, v, pattern, options, tuning, branches)


def tuning_for(q: torch.Tensor, tile_order: TileOrder, configs: Mapping[Kind, Config]) -> Tuning:
    """How kernels are compiled for the device and dtype of q, under PyTorch's present settings."""
    return Tuning(_capability(q.device), dot_precision(q.dtype), tile_order, configs)


class Accumulation:
    """A result that the launches add to one after another.

    Args:
        like: Shape, dtype and device of the result.
        branches: In the order of their launches.
        is_read_unwritten: Whether a launch reads rows that none before it has written.
    """

    def __init__(
        self, like: torch.Tensor, branches: Sequence[PlacedBranch], *, is_read_unwritten: bool
    ) -> None:
        self._like = like
        self._last = len(branches) - 1
        self._is_completed = branches[-1].rate == 1
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
        """The result, once all launches have run."""
        if self._result is not None:
            return self._result
        assert self._partial is not None
        return self._partial.to(self._like.dtype)


def dilated_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: DilatedPattern,
    options: Options,
    tuning: Tuning,
) -> AttentionOutput:
    """Out `(B, S, H, D)` and lse `(B, S, H)` of the whole pattern."""
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    if q.numel() == 0:
        return AttentionOutput(q.new_empty(q.shape), lse)
    call = make_call(q, k, v, pattern, options, tuning)
    out = Accumulation(q, call.branches, is_read_unwritten=False)
    run(forward_launches(call, out, lse), q.device)
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
    tuning: Tuning,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v; `out` and `lse` are those of a softmax over possibly more keys."""
    if q.numel() == 0:
        return q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    call = make_call(q, k, v, pattern, options, tuning)
    dout = _with_unit_stride(dout)
    lse = lse.float().contiguous()  # a caller may have merged it in float64
    row_values = lse.new_empty(*lse.shape, 2)
    dlse = None if dlse is None else dlse.contiguous()
    run([delta_launch(dout, out.contiguous(), dlse, lse, row_values)], q.device)
    is_read_unwritten = len(call.branches) > 1
    dq = Accumulation(q, call.branches, is_read_unwritten=is_read_unwritten)
    run(dq_launches(call, dout, row_values, dq), q.device)
    result = dq.finish()
    del dq  # frees its float32 buffer before those of dk and dv are allocated
    dk, dv = (Accumulation(x, call.branches, is_read_unwritten=is_read_unwritten) for x in (k, v))
    run(dk_dv_launches(call, dout, row_values, dk, dv), q.device)
    return result, dk.finish(), dv.finish()


def forward_launches(call: Call, out: Accumulation, lse: torch.Tensor) -> Iterator[Launch]:
    """One launch per branch; `lse` is −∞ before the first."""
    for i, branch in enumerate(call.branches):
        config = _config("forward", call, branch)
        tiles = -(-branch.max_rows // config.block_m)
        cells = tiles * branch.num_segments
        yield Launch(
            forward.forward_kernel,
            (cells * call.q.shape[0] * call.q.shape[2],),
            (
                *_inputs(call, branch, tiles),
                *(*out.buffers(i), lse),
                *_strides(call),
                *_geometry(call, branch, cells, tiles),
                *_numbers(call, branch),
            ),
            {
                **_constants(call, branch, config, call.q, call.k, call.v),
                "ATTENDED": call.pattern.padding == "attended",
                "POSITIVE_SCALE": call.options.scale > 0,
            },
        )


def delta_launch(
    dout: torch.Tensor,
    out: torch.Tensor,
    dlse: torch.Tensor | None,
    lse: torch.Tensor,
    row_values: torch.Tensor,
) -> Launch:
    """See `delta_kernel`."""
    B, S, H, D = out.shape
    width = block_d(D)
    block_m = max(16, 4096 // width)
    blocks = -(-S // block_m)
    return Launch(
        backward.delta_kernel,
        (B * blocks * H,),
        (*(dout, out, dlse, lse, row_values), *(*dout.stride()[:3], S, H, blocks)),
        {
            "HEAD_DIM": D,
            "BLOCK_M": block_m,
            "BLOCK_D": width,
            "num_warps": 8,
            "enable_fp_fusion": True,
        },
    )


def dq_launches(
    call: Call, dout: torch.Tensor, row_values: torch.Tensor, dq: Accumulation
) -> Iterator[Launch]:
    """One launch per branch."""
    for i, branch in enumerate(call.branches):
        config = _config("dq", call, branch)
        tiles = -(-branch.max_rows // config.block_m)
        cells = tiles * branch.num_segments
        yield Launch(
            backward.dq_kernel,
            (cells * call.q.shape[0] * call.q.shape[2],),
            (
                *_inputs(call, branch, tiles),
                *(dout, row_values, *dq.buffers(i)),
                *(*_strides(call), *dout.stride()[:3]),
                *_geometry(call, branch, cells, tiles),
                *_numbers(call, branch),
            ),
            _constants(call, branch, config, call.q, call.k, call.v, dout),
        )


def dk_dv_launches(
    call: Call, dout: torch.Tensor, row_values: torch.Tensor, dk: Accumulation, dv: Accumulation
) -> Iterator[Launch]:
    """One launch per branch."""
    B, _, H_kv, _ = call.k.shape
    for i, branch in enumerate(call.branches):
        config = _config("dk_dv", call, branch)
        tiles = -(-branch.max_rows // config.block_n)
        cells = tiles * branch.num_segments
        slots = count_slots(call.q.shape[2], H_kv, branch.rate, call.pattern)
        dk_partial, dk_destination = dk.buffers(i)
        dv_partial, dv_destination = dv.buffers(i)
        yield Launch(
            backward.dk_dv_kernel,
            (cells * B * H_kv * slots,),
            (
                *_inputs(call, branch, tiles),
                *(dout, row_values, dk_partial, dv_partial, dk_destination, dv_destination),
                *(*_strides(call), *dout.stride()[:3]),
                *(*_geometry(call, branch, cells, tiles), slots),
                *_numbers(call, branch),
            ),
            _constants(call, branch, config, call.q, call.k, call.v, dout),
        )


def is_wide(config: Config, rate: int, mask_stride: int, *tensors: torch.Tensor) -> bool:
    """Whether rows of one tile can be 2³¹ elements apart, in any of these tensors or a result."""
    _, _, H, D = tensors[0].shape
    strides = [H * max(D, 2), mask_stride, *(x.stride(1) for x in tensors)]
    return max(config.block_m, config.block_n) * rate * max(strides) >= 2**31


def _config(kind: Kind, call: Call, branch: PlacedBranch) -> Config:
    options = call.options
    has_extras = options.key_padding_mask is not None or options.dropout_p > 0
    return choose_config(
        kind, call.q.dtype, call.q.shape[3], call.tuning, branch.max_rows, has_extras
    )


def _inputs(call: Call, branch: PlacedBranch, tiles: int) -> tuple[torch.Tensor | None, ...]:
    """What every kernel but delta begins with."""
    mask = call.options.key_padding_mask
    order = order_table(call.tuning.tile_order, branch.num_segments, tiles, call.q.device)
    hidden = None if mask is None else mask.view(torch.uint8)
    return call.q, call.k, call.v, hidden, branch.segments, order


def _strides(call: Call) -> tuple[int, ...]:
    mask = _mask_strides(call.options.key_padding_mask)
    return *call.q.stride()[:3], *call.k.stride()[:3], *call.v.stride()[:3], *mask


def _geometry(call: Call, branch: PlacedBranch, cells: int, tiles: int) -> tuple[int, ...]:
    _, S, H, _ = call.q.shape
    heads_per_offset = -(-H // branch.rate)
    group = H // call.k.shape[2]
    return S, H, group, branch.segment_length, branch.rate, heads_per_offset, cells, tiles


def _numbers(call: Call, branch: PlacedBranch) -> tuple[float, float, int, int]:
    options = call.options
    return options.scale, options.dropout_p, options.dropout_seed, branch.number


def _constants(
    call: Call, branch: PlacedBranch, config: Config, *tensors: torch.Tensor
) -> dict[str, Any]:
    head_dim, options, tuning = call.q.shape[3], call.options, call.tuning
    mask_stride = _mask_strides(options.key_padding_mask)[1]
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d(head_dim),
        "IS_CAUSAL": options.is_causal,
        "BLOCKED": call.pattern.head_offsets == "blocked",
        "HAS_DROPOUT": options.dropout_p > 0,
        "PRECISION": tuning.precision,
        "WIDE": tuning.is_wide or is_wide(config, branch.rate, mask_stride, *tensors),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # Triton 3.9 warns without a value; the accuracy was checked with multiply-adds.
        "enable_fp_fusion": True,
    }


def _mask_strides(mask: torch.Tensor | None) -> tuple[int, int, int]:
    if mask is None:
        return 0, 0, 0
    return mask.stride(0), mask.stride(1), mask.stride(2) if mask.dim() == 3 else 0


def _with_unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int]:
    """The device's compute capability; a CPU is treated as 8.0."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
