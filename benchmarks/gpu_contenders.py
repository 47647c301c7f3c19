"""What the GPU benchmark compares: each contender is a function of q, k, v and a shape to run on.

- the backends over the whole pattern, by name: `triton` (fused) and those that work on strips;
- `auto`: what users get without naming a backend;
- `triton_hilbert`: the fused kernels with their tiles started along a Hilbert curve;
- `dense_*`: PyTorch's kernels over the whole sequence, the quadratic attention that is replaced;
- `windows_*`: PyTorch's kernels at the FLOPs of the pattern, in as many windows of w0 as it takes;
- `gather_flash`: copy the kept rows of a branch together, attend, scatter the result, mix the
  branches, as dilated attention was first published.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from dilated_core import DilatedPattern, available_backends, dilated_attention, register_backend
from dilated_core.backends.contract import AttentionInputs
from dilated_core.backends.registry import get_backend
from dilated_kernels.fused import TritonBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

FUSED, HILBERT = "triton", "triton_hilbert"
DENSE_KERNELS = {
    "cuda": {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION},
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION},
}

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Contender(NamedTuple):
    """Something to time.

    Attributes:
        attend: From q, k, v `(B, S, H, D)` to out of that shape.
        shape: The (B, S, H, D) to run on; None for that of the case.
        flops: Of its forward pass.
        computes: "pattern" if out is that of the pattern, "detached" if its gradient is not,
            "other" if it is a different computation.
    """

    attend: Attend
    shape: tuple[int, int, int, int] | None
    flops: int
    computes: str


def register_tile_orders() -> None:
    """Make the fused kernels with the other tile order a backend."""
    if HILBERT not in available_backends():
        register_backend(TritonBackend(tile_order="hilbert", name=HILBERT))


def runnable_backends(
    device: torch.device, dtype: torch.dtype, seq_len: int, num_heads: int, head_dim: int
) -> tuple[list[str], dict[str, str]]:
    """Names of the backends to measure, and why the others are not measured.

    eager is left out: it is the reference for correctness and no contender for speed.
    """
    inputs = AttentionInputs(device, dtype, num_heads=num_heads, head_dim=head_dim, seq_len=seq_len)
    names = [name for name in available_backends() if name != "eager"]
    reasons = {name: " ".join(get_backend(name).why_not(inputs)) for name in names}
    runnable = [name for name in names if not reasons[name]]
    return runnable, {name: why for name, why in reasons.items() if why}


def pattern_contender(name: str, pattern: DilatedPattern, is_causal: bool, flops: int) -> Contender:
    """A backend over the whole pattern."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return dilated_attention(q, k, v, pattern, is_causal=is_causal, backend=name)

    return Contender(attend, None, flops, "pattern")


def dense_contenders(
    device: torch.device, shape: tuple[int, int, int, int], w0: int, is_causal: bool, flops: int
) -> dict[str, Contender]:
    """PyTorch's kernels: over the same sequence, and in windows at the FLOPs of the pattern."""
    B, S, H, D = shape

    def count(length: int) -> int:
        pairs = length * (length + 1) // 2 if is_causal else length * length
        return 4 * D * H * B * pairs

    windows = max(1, round(flops / count(w0)))
    found = {}
    for kernel, backend in DENSE_KERNELS[device.type].items():
        attend = _dense(backend, is_causal)
        found[f"dense_{kernel}"] = Contender(attend, None, count(S), "other")
        window_shape = (windows * B, w0, H, D)
        found[f"windows_{kernel}"] = Contender(attend, window_shape, windows * count(w0), "other")
    return found


def gather_contender(
    pattern: DilatedPattern, seq_len: int, is_causal: bool, flops: int
) -> Contender | str:
    """Gather, attend, scatter over PyTorch's flash kernel; or why not."""
    uneven = [(w, r) for w, r in pattern.branches if seq_len % min(w, seq_len) or w % r]
    if uneven:
        return f"needs segments that divide S and rates that divide them; not so {uneven}"

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return gather_attend_scatter(q, k, v, pattern, is_causal=is_causal)

    return Contender(attend, None, flops, "detached")


def gather_attend_scatter(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: DilatedPattern, *, is_causal: bool
) -> torch.Tensor:
    """Dilated attention by copies: `(1, S, H, D)` to the same.

    Each branch makes contiguous copies of its rows of q, k and v, a result of full size that is
    zero elsewhere, and an lse of full size; the branches' results are added by their weights. The
    flash kernel's lse has no gradient, so the weights have none.

    Args:
        q, k, v: `(1, S, H, D)`; each segment length divides S, each rate its segment length.
        pattern: Interleaved head offsets.
        is_causal: As usual.
    """
    kernel = (
        torch.ops.aten._scaled_dot_product_flash_attention
        if q.is_cuda
        else torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    )
    _, S, H, D = q.shape
    outs, lses = [], []
    for w, r in pattern.branches:
        w = min(w, S)
        rows = _kept_rows(S, H, r, q.device)
        gathered = (
            x.view(S * H, D).index_select(0, rows).view(S // w, w // r, H, D).transpose(1, 2)
            for x in (q, k, v)
        )
        out, lse = (x.transpose(1, 2) for x in kernel(*gathered, 0.0, is_causal)[:2])
        full_lse = lse.new_full((S * H,), -torch.inf)
        outs.append(out.new_zeros(S * H, D).index_copy(0, rows, out.reshape(-1, D)))
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
