"""FLOP formulas of the operators, for `torch.utils.flop_counter.FlopCounterMode`.

PyTorch's module of counters imports Triton, which takes half a second and fixes whether Triton runs
in its interpreter. This module therefore never imports the counters. It registers the formulas when
an operator runs after other code has imported them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack,  # pyright: ignore[reportPrivateUsage]
)

from dilated_core.inputs import read_document_bounds
from dilated_core.ops import decode_options


def register_formulas() -> None:
    """Let FLOP counters count the operators, if the module of PyTorch's counters is loaded."""
    operators: Any = torch.ops.dilated_core
    add_formulas(
        {
            operators.attention_forward: forward_flops,
            operators.attention_backward: backward_flops,
            operators.cross_entropy_chunks: cross_entropy_flops,
        }
    )


def add_formulas(formulas: Mapping[Any, Callable[..., int]]) -> None:
    """Let FLOP counters count some operators, if the module of PyTorch's counters is loaded.

    Args:
        formulas: By operator, as in `torch.ops`: FLOPs of a call, given its arguments, and its
            result as `out_val`.
    """
    counters: Any = sys.modules.get("torch.utils.flop_counter")
    if counters is None:
        return
    for operator, formula in formulas.items():
        if operator not in counters.flop_registry:
            counters.register_flop_formula(operator, get_raw=True)(formula)
    # A counter copies the registry when it is made, which for the first call is before this.
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if isinstance(registry, dict):
            registry.update({op: formulas[op] for op in formulas if op not in registry})


def forward_flops(q: torch.Tensor, *arguments: Any, **_: Any) -> int:
    """FLOPs of `attention_forward`, given its arguments."""
    return _flops(q, arguments[-4], arguments[-1], backward=False)


def backward_flops(
    dout: torch.Tensor, dlse: Any, q: torch.Tensor, *arguments: Any, **_: Any
) -> int:
    """FLOPs of `attention_backward`, given its arguments."""
    return _flops(q, arguments[-4], arguments[-1], backward=True)


def cross_entropy_flops(
    hidden: torch.Tensor, weight: torch.Tensor, *arguments: Any, **_: Any
) -> int:
    """FLOPs of `cross_entropy_chunks`: a product for the logits, and for each gradient one."""
    wants_hidden, wants_weight, _bias = arguments[-1]
    return 2 * hidden.shape[0] * weight.numel() * (1 + wants_hidden + wants_weight)


def _flops(q: torch.Tensor, text: str, cu_seqlens: torch.Tensor | None, *, backward: bool) -> int:
    settings = decode_options(text)
    B, S, H, D = q.shape
    if H == 0:
        return 0

    def count(seq_len: int) -> int:
        return settings.pattern.flops(
            seq_len,
            H,
            D,
            batch_size=B,
            is_causal=settings.is_causal,
            backward=backward,
            head_range=settings.head_range,
        )

    # Where cu_seqlens has no values, one document of all positions is the upper bound.
    if cu_seqlens is None or type(cu_seqlens) is not torch.Tensor or cu_seqlens.is_meta:
        return count(S)
    lengths = Counter(map(int, read_document_bounds(cu_seqlens, S).diff()))
    return sum(count(length) * documents for length, documents in lengths.items())
