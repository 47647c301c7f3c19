"""Backend `xformers`: its memory-efficient attention, by its public names only.

xformers selects one of the kernels that it finds (flash-attn 3 or 2, CUTLASS), for forward and for
backward separately. Each kernel pads the lse differently, so backward receives it unpadded, which
every kernel accepts. No backward kernel shares heads of k and v, so the heads are repeated in both
directions.
"""

from __future__ import annotations

from typing import Any

import torch
from dilated_core.backends.contract import AttentionInputs

from dilated_kernels import availability
from dilated_kernels.availability import Library
from dilated_kernels.vendors.adapter import VendorBackend, repeated, summed

XFORMERS = Library(
    distribution="xformers",
    module="xformers.ops",
    minimum="0.0.35",  # the first for the oldest PyTorch of this package
    below="",
    install="pip install 'dilated-kernels[xformers]'",
)


def _why_not(inputs: AttentionInputs) -> list[str]:
    # One load is 16 bytes: 8 half-precision or 4 float32 values.
    multiple = 4 if inputs.dtype == torch.float32 else 8
    return (
        (
            availability.cuda_reasons(inputs, minimum=(5, 0))
            + availability.input_reasons(
                inputs,
                dtypes=(torch.float32, *availability.HALF_DTYPES),
                head_dim_multiple=multiple,
                max_head_dim=None,
            )
        )
        or availability.library_reasons(XFORMERS)
        or _kernel_reasons(inputs)
    )


def _kernel_reasons(inputs: AttentionInputs) -> list[str]:
    """Reasons that xformers reports: kernels for other GPUs, or a wheel for another PyTorch."""
    fmha = availability.imported("xformers.ops.fmha")
    shape = (1, 8, inputs.num_heads, inputs.head_dim)
    x = torch.empty(shape, dtype=inputs.dtype, device=inputs.device)
    question = fmha.Inputs(query=x, key=x, value=x, attn_bias=_mask(True), scale=1.0)
    reasons: list[str] = []
    for direction, operator in (("forward", "FwOp"), ("backward", "BwOp")):
        answers: list[str] = []
        for kernel in ("flash3", "flash", "cutlass"):
            problems = getattr(getattr(fmha, kernel), operator).not_supported_reasons(question)
            if not problems:
                break
            answers.append(f"{kernel}: {problems[0]}")
        else:
            reasons.append(
                f"xformers has no kernel for {direction} ({'; '.join(answers)}); see "
                f"python -m xformers.info."
            )
    return reasons


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = availability.imported(
        XFORMERS.module
    ).memory_efficient_attention_forward_requires_grad(
        q, repeated(k, q), repeated(v, q), attn_bias=_mask(is_causal), scale=scale
    )
    return out, lse[:, :, : q.shape[1]]  # CUTLASS pads rows to a multiple of 32


def _differentiate(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = availability.imported(XFORMERS.module).memory_efficient_attention_backward(
        *(dout, out, lse, q, repeated(k, q), repeated(v, q)),
        attn_bias=_mask(is_causal),
        scale=scale,
    )
    return dq, summed(dk, k), summed(dv, v)


def _mask(is_causal: bool) -> Any:
    return availability.imported(XFORMERS.module).LowerTriangularMask() if is_causal else None


xformers = VendorBackend("xformers", 20, _why_not, _attend, _differentiate)
