"""What the GPU benchmark compares: each contender is a function of q, k, v and a shape to run on.

- the backends over the whole pattern, by name: `triton` (fused) and those that work on strips;
- `auto`: what users get without naming a backend, where a call is so short that it matters;
- `triton_hilbert`: the fused kernels with their tiles started along a Hilbert curve;
- `dense_*`: PyTorch's kernels over the whole sequence, the quadratic attention that is replaced;
- `windows_*`, `square_*`: PyTorch's kernels at the FLOPs of the pattern, as many windows of w0 as
  it takes, or one sequence as long as it takes;
- `gather_*`: copy the kept rows of a branch together, attend, scatter the result, mix the branches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from dilated_core import (
    DilatedPattern,
    available_backends,
    dilated_attention,
    dilated_attention_with_lse,
    register_backend,
)
from dilated_core.backends.contract import AttentionInputs
from dilated_core.backends.registry import get_backend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

FUSED, HILBERT = "triton", "triton_hilbert"
DENSE_KERNELS = {
    "cuda": {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION},
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION},
}

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
AttendWithLse = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class Contender(NamedTuple):
    """Something to time.

    Attributes:
        attend: From q, k, v `(B, S, H, D)` to out of that shape.
        shape: The (B, S, H, D) to run on; None for that of the case.
        flops: Of its forward pass.
        computes: "pattern" if out is that of the pattern, "pattern, detached weights" if its
            gradient is not, "other" if it is a different computation.
    """

    attend: Attend
    shape: tuple[int, int, int, int] | None
    flops: int
    computes: str


def register_tile_orders() -> str | None:
    """Make the fused kernels with the other tile order a backend; says why where that fails."""
    try:
        from dilated_kernels.fused import TritonBackend
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    if HILBERT not in available_backends():
        register_backend(TritonBackend(tile_order="hilbert", name=HILBERT))
    return None


def runnable_backends(
    device: torch.device, dtype: torch.dtype, seq_len: int, num_heads: int, head_dim: int
) -> tuple[list[str], dict[str, str]]:
    """Names of the backends to measure, and why the others are not measured.

    eager is left out: it is the reference for correctness and no contender for speed.
    """
    inputs = AttentionInputs(device, dtype, num_heads=num_heads, head_dim=head_dim, seq_len=seq_len)
    runnable, reasons = [], {}
    for name in available_backends():
        if name == "eager":
            continue
        if why := get_backend(name).why_not(inputs):
            reasons[name] = " ".join(why)
        else:
            runnable.append(name)
    return runnable, reasons


def pattern_contender(name: str, pattern: DilatedPattern, is_causal: bool, flops: int) -> Contender:
    """A backend over the whole pattern."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return dilated_attention(q, k, v, pattern, is_causal=is_causal, backend=name)

    return Contender(attend, None, flops, "pattern")


def dense_contenders(
    device: torch.device, shape: tuple[int, int, int, int], w0: int, is_causal: bool, flops: int
) -> dict[str, Contender]:
    """PyTorch's kernels: over the same sequence, and at the FLOPs of the pattern in two shapes."""
    B, S, H, D = shape
    per_pair = 4 * D * H * B

    def pairs(length: int) -> int:
        return length * (length + 1) // 2 if is_causal else length * length

    windows = max(1, round(flops / (per_pair * pairs(w0))))
    square = math.isqrt(round(flops / per_pair * (2 if is_causal else 1)))
    square = max(square, 128) // 128 * 128 if device.type == "cuda" else square  # whole tiles
    found = {}
    for kernel, backend in DENSE_KERNELS[device.type].items():
        attend = _dense(backend, is_causal)
        found[f"dense_{kernel}"] = Contender(attend, None, per_pair * pairs(S), "other")
        found[f"windows_{kernel}"] = Contender(
            attend, (windows * B, w0, H, D), per_pair * pairs(w0) * windows, "other"
        )
        found[f"square_{kernel}"] = Contender(
            attend, (B, square, H, D), per_pair * pairs(square), "other"
        )
    return found


def gather_contenders(
    device: torch.device, pattern: DilatedPattern, seq_len: int, is_causal: bool, flops: int
) -> tuple[dict[str, Contender], str | None]:
    """Gather, attend, scatter over PyTorch's flash kernel and over the fused one; or why not."""
    uneven = [(w, r) for w, r in pattern.branches if seq_len % min(w, seq_len) or w % r]
    if uneven:
        return {}, f"needs segments that divide S and rates that divide them; not so {uneven}"
    found = {}
    kernels = {"flash": (_flash_with_lse, "pattern, detached weights")}
    if FUSED in available_backends():
        kernels[FUSED] = (_fused_with_lse, "pattern")
    for kernel, (attend_rows, computes) in kernels.items():

        def attend(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            attend_rows: AttendWithLse = attend_rows,
        ) -> torch.Tensor:
            return gather_attend_scatter(q, k, v, pattern, attend_rows, is_causal=is_causal)

        found[f"gather_{kernel}"] = Contender(attend, None, flops, computes)
    return found, None


def gather_attend_scatter(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: DilatedPattern,
    attend_rows: AttendWithLse,
    *,
    is_causal: bool,
) -> torch.Tensor:
    """Dilated attention by copies, as it was first published: `(1, S, H, D)` to the same.

    Each branch makes contiguous copies of its rows of q, k and v, a result of full size that is
    zero elsewhere, and an lse of full size; the branches' results are added by their weights.

    Args:
        q, k, v: `(1, S, H, D)`; each segment length divides S, each rate its segment length.
        pattern: Interleaved head offsets.
        attend_rows: From rows `(segments, M, H, D)` to out of that shape and lse
            `(segments, M, H)`.
        is_causal: As usual.
    """
    _, S, H, D = q.shape
    outs, lses = [], []
    for w, r in pattern.branches:
        w = min(w, S)
        rows = _kept_rows(S, H, r, q.device)
        gathered = (
            x.view(S * H, D).index_select(0, rows).view(S // w, w // r, H, D) for x in (q, k, v)
        )
        out, lse = attend_rows(*gathered, is_causal=is_causal)
        full_out = out.new_zeros(S * H, D)
        full_lse = lse.new_full((S * H,), -torch.inf)
        outs.append(full_out.index_copy(0, rows, out.reshape(-1, D)))
        lses.append(full_lse.index_copy(0, rows, lse.reshape(-1)))
    weights = torch.stack(lses).softmax(0).to(q.dtype)
    mixed = outs[0] * weights[0, :, None]
    for out, weight in zip(outs[1:], weights[1:], strict=True):
        mixed = mixed + out * weight[:, None]
    return mixed.view(1, S, H, D)


@lru_cache(maxsize=16)
def _kept_rows(S: int, H: int, r: int, device: torch.device) -> torch.Tensor:
    """Indices into the S · H rows of a contiguous tensor: kept positions, then heads."""
    heads = torch.arange(H, device=device)
    positions = torch.arange(0, S, r, device=device)[:, None] + heads % r
    return (positions * H + heads).flatten()


def _dense(backend: SDPBackend, is_causal: bool) -> Attend:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2)

    return attend


def _flash_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's flash kernel; its lse has no gradient, so the branches' weights have none."""
    kernel = (
        torch.ops.aten._scaled_dot_product_flash_attention
        if q.is_cuda
        else torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = kernel(q, k, v, 0.0, is_causal)[:2]
    return out.transpose(1, 2), lse.transpose(1, 2)


def _fused_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dense = DilatedPattern([q.shape[1]], [1])
    return dilated_attention_with_lse(q, k, v, dense, is_causal=is_causal, backend=FUSED)
