"""Backends `cudnn` and `efficient`: two of PyTorch's own kernels, each by its name.

Core's `sdpa` runs PyTorch's flash attention, and where it cannot, the memory-efficient attention.
`efficient` is the memory-efficient attention everywhere. `cudnn` is cuDNN's attention, the fastest
that PyTorch ships on Hopper and newer. Their operators take `(B, H, M, D)`, of any strides.
"""

from __future__ import annotations

from typing import Any

import torch
from dilated_core.backends.contract import AttentionInputs, AttentionOptions
from dilated_core.backends.eager import EagerBackend

from dilated_kernels import availability
from dilated_kernels.vendors.adapter import VendorBackend, repeated, summed

_aten: Any = torch.ops.aten

# Up to head_dim 128 cuDNN runs on every GPU and in both directions. Beyond, it depends on both and
# on its version (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, check_cudnn_tensor_shapes).
_CUDNN_MAX_HEAD_DIM = 128

_eager = EagerBackend()


def _why_not_cudnn(inputs: AttentionInputs) -> list[str]:
    return (
        availability.cuda_reasons(inputs, minimum=(8, 0))
        + availability.input_reasons(
            inputs,
            dtypes=availability.HALF_DTYPES,
            head_dim_multiple=8,
            max_head_dim=_CUDNN_MAX_HEAD_DIM,
        )
    ) or availability.cudnn_reasons()


def _cudnn_attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if k.shape[1] == 1:
        out, lse = _eager.forward(q, k, v, _one_key(scale))
        return out, lse.transpose(1, 2)
    B, M, H, _ = q.shape
    q_BHMD, k_BHMD, v_BHMD = _heads_first(q, repeated(k, q), repeated(v, q))
    out, lse = _aten._scaled_dot_product_cudnn_attention(
        q_BHMD, k_BHMD, v_BHMD, None, True, 0.0, is_causal, False, scale=scale
    )[:2]
    return out.transpose(1, 2), lse.reshape(B, H, M)


def _cudnn_differentiate(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if k.shape[1] == 1:
        return _eager.backward(
            dout, q, k, v, out, lse.transpose(1, 2), AttentionOptions(is_causal=False, scale=scale)
        )
    # PyTorch caches cuDNN's plan by the strides of q, k and v alone (MHA.cpp, MHACacheKeyWrapper),
    # although the plan depends on those of out and dout too. So these are always contiguous.
    dout, out = dout.contiguous(), out.contiguous()
    grads = _aten._scaled_dot_product_cudnn_attention_backward(
        *_heads_first(dout, q, repeated(k, q), repeated(v, q), out),
        lse.unsqueeze(-1),
        *_no_rng(q),
        None,  # no bias
        *(None, None),  # lengths do not vary
        *(q.shape[1], k.shape[1]),
        0.0,
        is_causal,
        scale=scale,
    )
    dq, dk, dv = _heads_first(*grads)
    return dq, summed(dk, k), summed(dv, v)


def _why_not_efficient(inputs: AttentionInputs) -> list[str]:
    # One load is 16 bytes: 8 half-precision or 4 float32 values.
    multiple = 4 if inputs.dtype == torch.float32 else 8
    return availability.cuda_reasons(inputs, minimum=(5, 0)) + availability.input_reasons(
        inputs,
        dtypes=(torch.float32, *availability.HALF_DTYPES),
        head_dim_multiple=multiple,
        max_head_dim=None,
    )


def _efficient_attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    q_BHMD, k_BHMD, v_BHMD = _heads_first(q, repeated(k, q), repeated(v, q))
    out, lse = _aten._scaled_dot_product_efficient_attention(
        q_BHMD, k_BHMD, v_BHMD, None, True, 0.0, is_causal, scale=scale
    )[:2]
    return out.transpose(1, 2), lse[:, :, : q.shape[1]]  # it pads rows to a multiple of 32


def _efficient_differentiate(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # A padded row must be +inf, for exp(score - lse) to be 0 there.
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=float("inf"))
    dout, q_BHMD, k_BHMD, v_BHMD, out = _heads_first(dout, q, repeated(k, q), repeated(v, q), out)
    grads = _aten._scaled_dot_product_efficient_attention_backward(
        *(dout, q_BHMD, k_BHMD, v_BHMD),
        None,  # no bias
        *(out, lse, *_no_rng(q)),
        0.0,
        [True, True, True, False],
        is_causal,
        scale=scale,
    )[:3]
    dq, dk, dv = _heads_first(*grads)
    return dq, summed(dk, k), summed(dv, v)


def _heads_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views with heads before rows, or rows before heads again."""
    return tuple(x.transpose(1, 2) for x in tensors)


def _no_rng(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Seed and offset: required arguments, which no kernel reads without dropout."""
    nothing = torch.zeros((), dtype=torch.int64, device=q.device)
    return nothing, nothing


def _one_key(scale: float) -> AttentionOptions:
    """Options for the strips that cuDNN refuses: those with a single key."""
    return AttentionOptions(is_causal=False, scale=scale)


cudnn = VendorBackend("cudnn", 30, _why_not_cudnn, _cudnn_attend, _cudnn_differentiate)
efficient = VendorBackend(
    "efficient", 15, _why_not_efficient, _efficient_attend, _efficient_differentiate
)
