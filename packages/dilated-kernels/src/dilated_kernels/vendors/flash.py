"""Backends `flash2`, `flash3` and `flash4`: the kernels of the flash-attention project.

Each major version has its own pair of functions, with small differences. Shapes: q and out
`(B, M, H, D)`, k and v with H_kv heads, lse `(B, H, M)` float32, natural logarithm. Causal masks
are aligned to the last row and key; with as many rows as keys the first ones are aligned too.

These are the functions that the libraries' own autograd functions call. They are not public. The
public ones have no backward from a given lse. Hence the bounds on versions.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from dilated_core.backends.contract import AttentionInputs

from dilated_kernels import availability
from dilated_kernels.availability import Library
from dilated_kernels.vendors.adapter import VendorBackend, repeated, summed

FLASH2 = Library(
    distribution="flash-attn",
    module="flash_attn.flash_attn_interface",
    minimum="2.7.0",  # before, forward returned padded copies and took a window as a pair
    below="3",
    install="pip install 'dilated-kernels[flash]'",
)
FLASH3 = Library(
    distribution="flash_attn_3",
    module="flash_attn_interface",
    minimum="3.0.0b1",
    below="4",
    install=(
        "build it from the folder hopper of https://github.com/Dao-AILab/flash-attention "
        "(python setup.py install)"
    ),
)
FLASH4 = Library(
    distribution="flash-attn-4",
    module="flash_attn.cute.interface",
    minimum="4.0.0b20",  # earlier ones have no deterministic backward on Hopper
    below="5",
    install="pip install --pre flash-attn-4",
)

_HOPPER = (9, 0)
_BLACKWELL = ((10, 0), (10, 3))


def _why_not_flash2(inputs: AttentionInputs) -> list[str]:
    return (
        availability.cuda_reasons(inputs, minimum=(8, 0))
        + availability.input_reasons(
            inputs, dtypes=availability.HALF_DTYPES, head_dim_multiple=8, max_head_dim=256
        )
    ) or availability.library_reasons(FLASH2)


def _flash2_attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = availability.imported(FLASH2.module)._flash_attn_forward(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=is_causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
    )[:2]
    return out, lse


def _flash2_differentiate(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = _new_gradients(q, k, v)
    availability.imported(FLASH2.module)._flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=is_causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=True,
    )
    return dq, dk, dv


def _why_not_flash3(inputs: AttentionInputs) -> list[str]:
    return (
        availability.cuda_reasons(inputs, minimum=_HOPPER, exactly=(_HOPPER,))
        + availability.input_reasons(
            inputs, dtypes=availability.HALF_DTYPES, head_dim_multiple=8, max_head_dim=256
        )
    ) or availability.library_reasons(FLASH3)


def _flash3_attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    forward = availability.imported(FLASH3.module)._flash_attn_forward
    blanks: dict[str, Any] = {}
    if inspect.isfunction(forward):
        # Before it became an operator with defaults, its two dozen options for caches and varying
        # lengths were required, and their number changed within 3.0.0b1.
        blanks = {
            name: None
            for name, parameter in inspect.signature(forward).parameters.items()
            if parameter.default is parameter.empty and name not in ("q", "k", "v")
        }
    out, lse = forward(q, k, v, **(blanks | {"softmax_scale": scale, "causal": is_causal}))[:2]
    return out, lse


def _flash3_differentiate(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # The deterministic sum over the heads of a group waits on counters that releases up to 3.0.0 do
    # not set to zero (hopper/flash_api.cpp, dk_semaphore). So every head gets its own k and v.
    k_BMHD, v_BMHD = repeated(k, q), repeated(v, q)
    dq, dk, dv = _new_gradients(q, k_BMHD, v_BMHD)
    availability.imported(FLASH3.module)._flash_attn_backward(
        *(dout, q, k_BMHD, v_BMHD, out, lse),
        *(None, None, None, None, None, None),  # lengths that vary over the batch
        *(dq, dk, dv),
        scale,
        is_causal,  # by position: `causal` became `is_causal`
        deterministic=True,
    )
    return dq, summed(dk, k), summed(dv, v)


def _why_not_flash4(inputs: AttentionInputs) -> list[str]:
    return (
        availability.cuda_reasons(inputs, minimum=_HOPPER, exactly=(_HOPPER, *_BLACKWELL))
        # Single releases take more on Hopper, or 256 on Blackwell, in one direction only.
        + availability.input_reasons(
            inputs, dtypes=availability.HALF_DTYPES, head_dim_multiple=8, max_head_dim=128
        )
    ) or availability.library_reasons(FLASH4)


def _flash4_attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = availability.imported(FLASH4.module)._flash_attn_fwd(
        q, k, v, softmax_scale=scale, causal=is_causal, return_lse=True
    )[:2]
    return out, lse


def _flash4_differentiate(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = availability.imported(FLASH4.module)._flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=scale, causal=is_causal, deterministic=True
    )
    return dq, dk, dv


def _new_gradients(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Contiguous tensors for the gradients, whatever the strides of the inputs."""
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


flash2 = VendorBackend("flash2", 42, _why_not_flash2, _flash2_attend, _flash2_differentiate)
flash3 = VendorBackend("flash3", 43, _why_not_flash3, _flash3_attend, _flash3_differentiate)
flash4 = VendorBackend("flash4", 44, _why_not_flash4, _flash4_attend, _flash4_differentiate)
