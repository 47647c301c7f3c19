"""Backend `flex`: the whole pattern through PyTorch's flex_attention.

The pattern becomes two functions of indices, which PyTorch compiles into its kernel: a mask (does
any branch let query i see key j?) and a change of the score (a key that c branches select gets
log c more, so that it counts c times). It is for comparisons and experiments: the kernel computes
every block of 128 x 128 positions in which a query sees a key, and a dilated branch skips few.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from dilated_core import AttentionOutput, DilatedPattern, merge_partials
from dilated_core.backends.contract import (
    CONTRACT_VERSION,
    AttentionInputs,
    AttentionOptions,
    Gradients,
)

from dilated_kernels import availability
from dilated_kernels.flex.mask import (
    Mask,
    documents_of,
    many_kernels,
    pattern_mask,
    strip_mask,
    zero_keys,
)
from dilated_kernels.ranking.table import Rank, rank

_CPU_DTYPES = (torch.float64, torch.float32, *availability.HALF_DTYPES)
_CUDA_DTYPES = (torch.float32, *availability.HALF_DTYPES)
_MIN_HEAD_DIM_CUDA = 16  # smallest side of a matrix product in Triton

# The dispatcher's state has no public name.
_C: Any = torch._C  # pyright: ignore[reportPrivateUsage]

_NOT_COMPILED = "flex_attention called without torch.compile"
_warnings_lock = Lock()


class FlexBackend:
    """Dilated attention by PyTorch's flex_attention; on CPU forward only."""

    name = "flex"
    priority = -1  # only by name
    contract = CONTRACT_VERSION

    def priority_for(self, inputs: AttentionInputs) -> Rank:
        """See `AttentionBackend`."""
        return rank(self.name, inputs)

    def why_not(self, inputs: AttentionInputs) -> list[str]:
        """See `AttentionBackend.why_not`."""
        kind = inputs.device.type
        reasons = [] if kind == "cpu" else availability.cuda_reasons(inputs, minimum=(7, 5))
        reasons += availability.input_reasons(
            inputs._replace(has_key_padding_mask=False),
            dtypes=_CPU_DTYPES if kind == "cpu" else _CUDA_DTYPES,
            head_dim_multiple=1,
            max_head_dim=None,
        )
        if inputs.max_workspace_bytes is not None:
            reasons.append(
                f"max_workspace_bytes is {inputs.max_workspace_bytes}; PyTorch's compiler chooses "
                f"its workspace and takes no limit."
            )
        return reasons

    def dilated_forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pattern: DilatedPattern,
        options: AttentionOptions,
        *,
        cu_seqlens: torch.Tensor | None,
    ) -> AttentionOutput:
        """See `AttentionBackend`."""
        _refuse_dropout(options.dropout_p)
        documents = documents_of(cu_seqlens, q)
        mask = pattern_mask(
            pattern,
            q,
            is_causal=options.is_causal,
            documents=documents,
            key_padding_mask=options.key_padding_mask,
        )
        result = _attend(q.detach(), k.detach(), v.detach(), mask, options.scale)
        if pattern.padding == "masked" or options.is_causal:
            return result
        count = zero_keys(pattern, q, documents)
        lse = count.to(result.lse.dtype).log().expand(result.lse.shape)
        return merge_partials([result, AttentionOutput(torch.zeros_like(result.out), lse)])

    def dilated_backward(
        self,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        pattern: DilatedPattern,
        options: AttentionOptions,
        *,
        cu_seqlens: torch.Tensor | None,
    ) -> Gradients:
        """See `AttentionBackend`. Zero keys have no gradient; they are in `out` and `lse`.

        Raises:
            NotImplementedError: On CPU, where PyTorch's flex_attention has no backward.
        """
        _refuse_dropout(options.dropout_p)
        mask = pattern_mask(
            pattern,
            q,
            is_causal=options.is_causal,
            documents=documents_of(cu_seqlens, q),
            key_padding_mask=options.key_padding_mask,
        )
        return _differentiate(dout, dlse, q, k, v, out, lse, mask, options.scale)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        options: AttentionOptions,
    ) -> AttentionOutput:
        """See `AttentionBackend.forward`."""
        _refuse_dropout(options.dropout_p)
        mask = strip_mask(q, k, options)
        return _attend(q.detach(), k.detach(), v.detach(), mask, options.scale)

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
        """See `AttentionBackend.backward`.

        Raises:
            NotImplementedError: On CPU, where PyTorch's flex_attention has no backward.
        """
        _refuse_dropout(options.dropout_p)
        mask = strip_mask(q, k, options)
        return _differentiate(dout, None, q, k, v, out, lse, mask, options.scale)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float
) -> AttentionOutput:
    D = q.shape[3]
    missing = 0 if q.device.type == "cpu" else max(0, _MIN_HEAD_DIM_CUDA - D)
    q_BHMD, k_BKMD, v_BKMD = (
        # Zeros change no product, and the columns that they add to out are cut off.
        torch.nn.functional.pad(x, (0, missing)).transpose(1, 2) if missing else x.transpose(1, 2)
        for x in (q, k, v)
    )
    out, lse = _flex_attention(q.device.type)(
        q_BHMD,
        k_BKMD,
        v_BKMD,
        score_mod=mask.score_mod,
        block_mask=mask.block_mask,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return AttentionOutput(out[..., :D].transpose(1, 2), lse.transpose(1, 2))


def _differentiate(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: Mask,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients given an out and lse that may be over more keys than `mask` allows.

    flex_attention differentiates its own (o', l') only. With (o, l) over all keys, p = exp(s - l)
    and ds = p * (dout.v - dout.o + dlse) are the result of its backward for

        do' = exp(l' - l) * dout   and   dl' = exp(l' - l) * (dout.(o' - o) + dlse),

    because its own probabilities are p' = exp(s - l') = exp(l - l') * p.
    """
    if not _has_backward(q.device.type):
        raise NotImplementedError(
            f"backend 'flex' has no backward on {q.device.type}, because PyTorch's flex_attention "
            f"has none there; use backend='sdpa' (or 'auto') to train on {q.device.type}."
        )
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with _RecordingGradients():
        own = _attend(leaves[0], leaves[1], leaves[2], mask, scale)
        own_lse = own.lse.detach()
        # A row without keys has l' = -inf and no gradient, whatever l is.
        weight = (own_lse - lse).exp().masked_fill(own_lse == -math.inf, 0)
        weighted_dout = dout * weight.unsqueeze(-1)
        through_lse = (weighted_dout * (own.out.detach().to(weight.dtype) - out)).sum(-1)
        if dlse is not None:
            through_lse += weight * dlse
        dq, dk, dv = torch.autograd.grad(
            tuple(own), leaves, (weighted_dout.to(q.dtype), through_lse.to(own_lse.dtype))
        )
    return dq, dk, dv


class _RecordingGradients:
    """Record operations for autograd, even in the kernel of an operator.

    PyTorch runs such kernels below autograd: the dispatcher skips autograd, and `enable_grad` alone
    changes nothing. Another thread has autograd, but would wait for the thread of the device, which
    waits for it.
    """

    def __enter__(self) -> None:
        below = _C._dispatch_tls_local_exclude_set()
        for key in (
            _C.DispatchKey.AutogradFunctionality,
            _C.DispatchKey.AutogradOther,
            _C.DispatchKey.AutogradNestedTensor,
        ):
            below = below.remove(key)
        self._keys = _C._ForceDispatchKeyGuard(_C._dispatch_tls_local_include_set(), below)
        self._grad = torch.enable_grad()
        self._keys.__enter__()
        self._grad.__enter__()

    def __exit__(self, *error: object) -> None:
        self._grad.__exit__(*error)
        self._keys.__exit__(*error)


def _flex_attention(kind: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """flex_attention that returns out and lse `(B, H, M)`: compiled, except on CPU."""
    return _flex_eager if kind == "cpu" else _flex_compiled


def _has_backward(kind: str) -> bool:
    return kind != "cpu"


def _flex_eager(*tensors: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    # Filters of warnings belong to the process: threads would restore each other's.
    with _warnings_lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_NOT_COMPILED)
        return _flex_with_lse(*tensors, **options)


def _flex_compiled(*tensors: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with many_kernels():
        return _compiled_flex_with_lse()(*tensors, **options)


def _flex_with_lse(*tensors: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    # Its import alone takes a good part of a second.
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    function: Any = flex_attention  # its overloads take no dictionary of keywords
    out, aux = function(*tensors, **options, return_aux=AuxRequest(lse=True))
    return out, aux.lse


@lru_cache(maxsize=1)
def _compiled_flex_with_lse() -> Any:
    return torch.compile(_flex_with_lse, fullgraph=True)


def _refuse_dropout(dropout_p: float) -> None:
    """Repeat the `why_not` check for callers that skipped it."""
    if dropout_p:
        raise ValueError(
            f"dropout_p is {dropout_p}, and backend 'flex' has no dropout; use backend='eager'."
        )


flex = FlexBackend()
