"""Calls of PyTorch's flex_attention: compiled or eager, forward, and backward from a given lse."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from dilated_core import AttentionOutput, Gradients

from dilated_kernels.flex.mask import Mask, is_compiled, many_kernels, one_kernel_for_sizes

_MIN_HEAD_DIM_CUDA = 16  # smallest side of a matrix product in Triton

# The dispatcher's state has no public name.
_C: Any = torch._C  # pyright: ignore[reportPrivateUsage]

_NOT_COMPILED = "flex_attention called without torch.compile"
_warnings_lock = Lock()


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float
) -> AttentionOutput:
    """Out `(B, M, H, D)` and lse `(B, M, H)` of `(B, M, H, D)` tensors."""
    D = q.shape[3]
    missing = max(0, _MIN_HEAD_DIM_CUDA - D) if is_compiled(q.device.type) else 0
    q_BHMD, k_BKMD, v_BKMD = (
        # Zeros change no product, and the columns that they add to out are cut off.
        torch.nn.functional.pad(x, (0, missing)).transpose(1, 2) if missing else x.transpose(1, 2)
        for x in (q, k, v)
    )
    options: Mapping[str, Any] = {} if mask.kernel_options is None else mask.kernel_options
    out, lse = _flex_attention(q.device.type, mask)(
        q_BHMD,
        k_BKMD,
        v_BKMD,
        score_mod=mask.score_mod,
        block_mask=mask.block_mask,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
        kernel_options=dict(options),
    )
    return AttentionOutput(out[..., :D].transpose(1, 2), lse.transpose(1, 2))


def differentiate(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    mask: Mask,
    scale: float,
) -> Gradients:
    """Gradients given an lse and a delta that may be over more keys than `mask` allows.

    flex_attention differentiates its own (o', l') only, so it runs forward once more. With (o, l)
    over all keys, p = exp(s - l), delta = dout.o - dlse and ds = p * (dout.v - delta) are the
    result of its backward for

        do' = exp(l' - l) * dout   and   dl' = exp(l' - l) * (dout.o' - delta),

    because its own probabilities are p' = exp(s - l') = exp(l - l') * p.

    Args:
        dout: `(B, M, H, D)`, as q.
        q, k, v, mask, scale: As for `attend`.
        lse: `(B, M, H)`; +inf for a row without keys.
        delta: `(B, M, H)`.

    Raises:
        NotImplementedError: On CPU, where PyTorch's flex_attention has no backward.
    """
    if not _has_backward(q.device.type):
        raise NotImplementedError(
            f"backend 'flex' has no backward on {q.device.type}, because PyTorch's flex_attention "
            f"has none there; use backend='sdpa' (or 'auto') to train on {q.device.type}."
        )
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with _RecordingGradients():
        own = attend(leaves[0], leaves[1], leaves[2], mask, scale)
        own_lse = own.lse.detach()
        # A row without keys has l' = -inf and no gradient, whatever l is.
        weight = (own_lse - lse).exp().masked_fill(own_lse == -math.inf, 0)
        wide = weight.dtype
        through_lse = (dout.to(wide) * own.out.detach().to(wide)).sum(-1) - delta
        dq, dk, dv = torch.autograd.grad(
            tuple(own),
            leaves,
            ((dout * weight.unsqueeze(-1)).to(q.dtype), (weight * through_lse).to(own_lse.dtype)),
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


def _flex_attention(kind: str, mask: Mask) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """flex_attention that returns out and lse `(B, H, M)`."""
    if not is_compiled(kind):
        return _flex_eager
    return _flex_of_any_size if mask.has_any_size else _flex_of_one_size


def _has_backward(kind: str) -> bool:
    return kind != "cpu"


def _flex_eager(*tensors: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    # Filters of warnings belong to the process: threads would restore each other's.
    with _warnings_lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_NOT_COMPILED)
        return _flex_with_lse(*tensors, **options)


def _flex_of_one_size(*tensors: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with many_kernels():
        return _compiled(is_dynamic=None)(*tensors, **options)


def _flex_of_any_size(*tensors: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with one_kernel_for_sizes():
        return _compiled(is_dynamic=True)(*tensors, **options)


def _flex_with_lse(*tensors: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    # Its import alone takes a good part of a second.
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    function: Any = flex_attention  # its overloads take no dictionary of keywords
    out, aux = function(*tensors, **options, return_aux=AuxRequest(lse=True))
    return out, aux.lse


@lru_cache(maxsize=2)
def _compiled(*, is_dynamic: bool | None) -> Any:
    """The compiled function; `is_dynamic` as `dynamic` of `torch.compile`."""
    return torch.compile(_flex_with_lse, fullgraph=True, dynamic=is_dynamic)
