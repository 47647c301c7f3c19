"""The shared part of all adapters to vendor kernels: a backend made of three functions.

B batch of a strip, M its rows, H heads, D head_dim, as suffixes of names.

The kernels differ in names and layouts. This module meets the contract of `AttentionBackend` for
all of them: scales of any sign, strips of any strides and any number of segments, NaN for NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from dilated_core import AttentionOutput
from dilated_core.backends.contract import (
    CONTRACT_VERSION,
    AttentionInputs,
    AttentionOptions,
    Gradients,
)
from dilated_core.merge import accumulation_dtype

from dilated_kernels.ranking.table import Rank, rank

# The most programs in the second and third dimension of a CUDA grid; kernels put the batch into one
# of them. A strip's batch counts segments: 65 536 segments of 2048 are 134 million positions.
_MAX_BATCH = 65535

# Bytes that kernels load at once. A row that begins at no multiple of it is a memory fault.
_ALIGNMENT = 16

_T = torch.Tensor

Attend = Callable[[_T, _T, _T, bool, float], tuple[_T, _T]]
"""(q, k, v, is_causal, scale) -> out `(B, M, H, D)` and natural lse `(B, H, M)`, scale above 0.

k and v are `(B, N, K, D)`; is_causal only with N = M.
"""

Differentiate = Callable[[_T, _T, _T, _T, _T, _T, bool, float], tuple[_T, _T, _T]]
"""(dout, q, k, v, out, lse, is_causal, scale) -> dq, dk, dv; lse contiguous `(B, H, M)`."""


@dataclass(slots=True)
class VendorBackend:
    """A backend that runs a vendor's kernel on each strip.

    Attributes:
        name: The value of `backend=` that selects it.
        priority: See `AttentionBackend`.
        reasons: Its `why_not`.
        attend: The kernel's forward.
        differentiate: The kernel's backward from a given out and lse.
        contract: See `AttentionBackend`.
    """

    name: str
    priority: int
    reasons: Callable[[AttentionInputs], list[str]]
    attend: Attend
    differentiate: Differentiate
    contract: int = CONTRACT_VERSION

    def priority_for(self, inputs: AttentionInputs) -> Rank:
        """See `RankedBackend`."""
        return rank(self.name, inputs)

    def why_not(self, inputs: AttentionInputs) -> list[str]:
        """See `AttentionBackend.why_not`."""
        return self.reasons(inputs)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        options: AttentionOptions,
    ) -> AttentionOutput:
        """See `AttentionBackend.forward`."""
        self._refuse(options)
        if q.numel() == 0:
            return AttentionOutput(torch.empty_like(q), q.new_empty(q.shape[:-1]).float())
        q, scale, _ = _with_positive_scale(q, options.scale)
        outs: list[torch.Tensor] = []
        lses: list[torch.Tensor] = []
        for part in _in_batches(q, k, v):
            q_, k_, v_ = map(_aligned, part)
            out_, lse_ = self.attend(q_, k_, v_, options.is_causal, scale)
            outs.append(out_)
            lses.append(lse_)
        lse_BHM = _joined(lses)
        # Each row sees a key, so its sum of exponentials is finite and above 0, or NaN. For NaN,
        # flash-attn 2 returns the lse +inf, and 3 and 4 return -inf.
        lse_BHM = lse_BHM.masked_fill(lse_BHM.isinf(), float("nan"))
        return AttentionOutput(_joined(outs), lse_BHM.transpose(1, 2))

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        options: AttentionOptions,
        *,
        delta: torch.Tensor | None = None,
    ) -> Gradients:
        """See `AttentionBackend.backward`; the kernels compute delta themselves."""
        self._refuse(options)
        if q.numel() == 0:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        q, scale, sign = _with_positive_scale(q, options.scale)
        # A caller may have merged it in float64.
        lse_BHM = lse.transpose(1, 2).contiguous().to(accumulation_dtype(q.dtype))
        grads: tuple[list[torch.Tensor], ...] = ([], [], [])
        for *part, lse_ in _in_batches(dout, q, k, v, out, lse_BHM):
            dout_, q_, k_, v_, out_ = map(_aligned, part)
            new = self.differentiate(dout_, q_, k_, v_, out_, lse_, options.is_causal, scale)
            for all_of_it, grad in zip(grads, new, strict=True):
                all_of_it.append(grad)
        dq, dk, dv = map(_joined, grads)
        return dq if sign == 1 else dq * sign, dk, dv

    def _refuse(self, options: AttentionOptions) -> None:
        """Repeat the `why_not` check for callers that skipped it."""
        if options.dropout_p or options.key_padding_mask is not None:
            raise ValueError(
                f"backend {self.name!r} has neither dropout (dropout_p is {options.dropout_p}) nor "
                f"key_padding_mask; call its why_not first."
            )


def repeated(x_BMKD: torch.Tensor, q_BMHD: torch.Tensor) -> torch.Tensor:
    """The heads of k or v repeated to as many as q has, for kernels that cannot share them."""
    groups = q_BMHD.shape[2] // x_BMKD.shape[2]
    return x_BMKD if groups == 1 else x_BMKD.repeat_interleave(groups, dim=2)


def summed(grad_BMHD: torch.Tensor, x_BMKD: torch.Tensor) -> torch.Tensor:
    """The gradient of `x_BMKD`: that of its repeated heads, summed in float32 or wider."""
    B, M, K, D = x_BMKD.shape
    if grad_BMHD.shape[2] == K:
        return grad_BMHD
    wide = torch.promote_types(grad_BMHD.dtype, torch.float32)
    return grad_BMHD.reshape(B, M, K, -1, D).sum(3, dtype=wide).to(grad_BMHD.dtype)


def _with_positive_scale(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float, int]:
    """Rewrite q and scale to the same product with scale above 0; also returns the factor of q.

    Kernels take the maximum of the unscaled scores, and a negative scale turns it into the minimum.
    """
    if scale > 0:
        return q, scale, 1
    sign = -1 if scale < 0 else 0
    return q * sign, -scale or 1.0, sign


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """`x` itself if kernels can load its rows through its strides, else a contiguous copy.

    Kernels do not check it. Rows of a contiguous copy begin at multiples of D, which `why_not` has
    checked. Rows of a tensor that is cut out of a larger one need not.
    """
    step = max(1, _ALIGNMENT // x.element_size())
    is_aligned = (
        x.stride(-1) == 1
        and x.storage_offset() % step == 0
        and all(
            stride % step == 0 and stride > 0
            for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)
            if size > 1
        )
    )
    # clone: contiguous() returns a contiguous tensor as it is, even at an odd offset.
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)


def _in_batches(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The tensors, or their slices of at most `_MAX_BATCH` along the batch."""
    batch_size = tensors[0].shape[0]
    if batch_size <= _MAX_BATCH:
        yield tensors
        return
    for start in range(0, batch_size, _MAX_BATCH):
        yield tuple(x[start : start + _MAX_BATCH] for x in tensors)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
