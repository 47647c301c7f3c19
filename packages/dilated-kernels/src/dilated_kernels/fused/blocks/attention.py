"""Block-sparse attention: from tensors and lists of blocks to launches and results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from dilated_core import AttentionOptions, AttentionOutput, Gradients
from dilated_core.backends.contract import BlockLists

from dilated_kernels.fused.attention import is_wide
from dilated_kernels.fused.blocks import kernels
from dilated_kernels.fused.configs import block_d, choose_config
from dilated_kernels.fused.launch import Launch, run
from dilated_kernels.fused.tuning import Config, Kind, Tuning


class Call(NamedTuple):
    """What the launches of one call share; tensors have stride 1 in the last dimension."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    blocks: BlockLists
    options: AttentionOptions
    tuning: Tuning


def forward(call: Call) -> AttentionOutput:
    """Out `(B, S, H, D)` and lse `(B, S, H)`, contiguous."""
    q = call.q
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if q.numel():
        run([forward_launch(_readable(call), out, lse)], q.device)
    return AttentionOutput(out, lse)


def backward(dout: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, call: Call) -> Gradients:
    """Contiguous gradients of q, k and v; see `BlockSparseBackend` for lse and delta."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (call.q, call.k, call.v))
    if call.q.numel():
        dout = _with_unit_stride(dout)
        lse, delta = lse.float().contiguous(), delta.float().contiguous()
        launches = backward_launches(_readable(call), dout, lse, delta, (dq, dk, dv))
        run(launches, call.q.device)
    return dq, dk, dv


def forward_launch(call: Call, out: torch.Tensor, lse: torch.Tensor) -> Launch:
    """The launch of `forward_kernel`; out and lse are contiguous, and written."""
    B, S, H, _ = call.q.shape
    config = _config("forward", call)
    tiles = -(-S // config.block_m)
    return Launch(
        kernels.forward_kernel,
        (tiles * H * B,),
        (
            *_inputs(call, call.blocks.row_offsets, call.blocks.key_blocks),
            *(out, lse),
            *(*_strides(call), *_geometry(call, tiles), call.options.scale),
        ),
        _constants(call, config, call.q, call.k, call.v),
    )


def backward_launches(
    call: Call, dout: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, grads: Gradients
) -> Iterator[Launch]:
    """The launches of `dq_kernel` and `dk_dv_kernel`; lse, delta and the gradients contiguous."""
    B, S, H, _ = call.q.shape
    dq, dk, dv = grads
    tensors = (call.q, call.k, call.v, dout)
    strides = (*_strides(call), *dout.stride()[:3])
    config = _config("dq", call)
    tiles = -(-S // config.block_m)
    yield Launch(
        kernels.dq_kernel,
        (tiles * H * B,),
        (
            *_inputs(call, call.blocks.row_offsets, call.blocks.key_blocks),
            *(dout, lse, delta, dq),
            *(*strides, *_geometry(call, tiles), call.options.scale),
        ),
        _constants(call, config, *tensors),
    )
    config = _config("dk_dv", call)
    tiles = -(-S // config.block_n)
    yield Launch(
        kernels.dk_dv_kernel,
        (tiles * call.k.shape[2] * B,),
        (
            *_inputs(call, call.blocks.column_offsets, call.blocks.query_blocks),
            *(dout, lse, delta, dk, dv),
            *(*strides, *_geometry(call, tiles), call.options.scale),
        ),
        _constants(call, config, *tensors),
    )


def _readable(call: Call) -> Call:
    q, k, v = (_with_unit_stride(x) for x in (call.q, call.k, call.v))
    return call._replace(q=q, k=k, v=v)


def _with_unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _config(kind: Kind, call: Call) -> Config:
    """The configuration of the dense kernel, with tiles that divide a block.

    Both sizes are powers of two, so the smaller one divides the larger one. Every tile has a mask,
    so the entries for kernels with masks are taken.
    """
    size, D = call.blocks.block_size, call.q.shape[3]
    return choose_config(kind, call.q.dtype, D, call.tuning, max_rows=size, extras=True)


def _inputs(
    call: Call, offsets: torch.Tensor, entries: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    mask = call.options.key_padding_mask
    return (
        call.q,
        call.k,
        call.v,
        None if mask is None else mask.view(torch.uint8),
        offsets,
        entries,
    )


def _strides(call: Call) -> tuple[int, ...]:
    mask = call.options.key_padding_mask
    mask_strides = (0, 0) if mask is None else mask.stride()
    return *call.q.stride()[:3], *call.k.stride()[:3], *call.v.stride()[:3], *mask_strides


def _geometry(call: Call, tiles: int) -> tuple[int, ...]:
    _, S, H, _ = call.q.shape
    num_lists, num_offsets = call.blocks.row_offsets.shape
    return S, H, H // call.k.shape[2], num_offsets - 1, H // num_lists, tiles


def _constants(call: Call, config: Config, *tensors: torch.Tensor) -> dict[str, Any]:
    head_dim, tuning = call.q.shape[3], call.tuning
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": call.blocks.block_size,
        "BLOCK_D": block_d(head_dim),
        "IS_CAUSAL": call.options.is_causal,
        "PRECISION": tuning.precision,
        "WIDE": tuning.is_wide or is_wide(config, 1, 0, *tensors),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # Triton 3.9 warns without a value; the accuracy was checked with multiply-adds.
        "enable_fp_fusion": True,
    }
