"""Options of content-adaptive attention. Each option is declared here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from dilated_core import MultiheadConfig
from dilated_core.checks import (
    answers_names,
    check_bool,
    check_choice,
    check_float_dtype,
    check_head_groups,
    check_integer,
    check_number,
    set_checked,
)
from dilated_core.inputs import check_backend_name, check_dropout, check_scale
from dilated_core.modules.config import FORWARD_ARGUMENTS

from dilated_sparse.adaptive.choice import Budget
from dilated_sparse.pattern.ratio import check_ratio

Distillation = Literal["kept", "all", "none"]

FORWARD_NAMES = (*FORWARD_ARGUMENTS, "unrotated")
"""Keywords of the forward of the modules."""

ELSEWHERE = dict.fromkeys(FORWARD_NAMES, "is passed to forward") | {
    "pattern_type": "has no counterpart, since the content decides, so leave it out",
}

_LEAST = {"block_size": 1, "local_blocks": 0, "sink_blocks": 0, "num_random": 0, "gate_dim": 1}


@answers_names(ELSEWHERE)
@dataclass(frozen=True, kw_only=True)
class AdaptiveSparseConfig:
    """How `AdaptiveSparseAttention` selects blocks, and how it learns to.

    At most one of `topk`, `mass` and `sparsity_ratio` is given; without any, `sparsity_ratio` is
    0.1. The row's own block, `local_blocks` and `sink_blocks` count, and are kept even beyond it.

    Attributes:
        topk: Blocks to keep of each row of blocks.
        mass: Keep the fewest blocks whose estimated softmax mass adds up to this, in (0, 1].
        sparsity_ratio: Fraction of blocks to *keep*, in (0, 1]. Causal attention counts the blocks
            at and below the diagonal.
        block_size: Positions of a block.
        sub_block_size: Positions that the estimate sums up in one; it divides `block_size`. None:
            the largest divisor of `block_size` up to 16.
        local_blocks: Blocks next to the row's own that are always kept.
        sink_blocks: First blocks that are always kept.
        lookahead: In causal attention, whether a selection reads all queries of its block, as most
            published methods do in training. False: it reads the queries of the block before, and
            the first of its own, so that no output depends on a later position.
        gate_dim: Rank of the learned correction.
        gate_gradient: `"bias"` adds the learned correction of each block to the scores of
            attention, so that the gradient of the output reaches the gate. None: the gate only
            selects.
        distillation: What the gate learns from in training mode: the exact softmax mass of the
            blocks that are `"kept"` and of `num_random` others, of `"all"` blocks, or `"none"`.
        distillation_weight: Factor of its loss.
        num_random: Random blocks of each row that `"kept"` adds.
        scale: Factor of the scores; 1/√head_dim if None.
        dropout: Probability of dropping each attention probability in training mode.
        backend: `"auto"` or the name of a backend.

    Raises:
        TypeError: If a value has the wrong type, or an argument is unknown.
        ValueError: If a value is out of range, or more than one budget is given.
    """

    topk: int | None = None
    mass: float | None = None
    sparsity_ratio: float | None = None
    block_size: int = 64
    sub_block_size: int | None = None
    local_blocks: int = 1
    sink_blocks: int = 1
    lookahead: bool = False
    gate_dim: int = 32
    gate_gradient: Literal["bias"] | None = None
    distillation: Distillation = "kept"
    distillation_weight: float = 1.0
    num_random: int = 2
    scale: float | None = None
    dropout: float = 0.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        budgets = {"topk": self.topk, "mass": self.mass, "sparsity_ratio": self.sparsity_ratio}
        given = [f"{name}={value!r}" for name, value in budgets.items() if value is not None]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} are given; they are budgets of the same blocks, so give "
                f"one of topk, mass and sparsity_ratio."
            )
        if self.mass is not None:
            set_checked(self, mass=check_number("mass", self.mass, above=0, at_most=1))
        if self.sparsity_ratio is not None:
            set_checked(self, sparsity_ratio=check_ratio(self.sparsity_ratio))
        for name, value in (("topk", self.topk), ("sub_block_size", self.sub_block_size)):
            if value is not None:
                set_checked(self, **{name: check_integer(name, value, at_least=1)})
        for name, least in _LEAST.items():
            set_checked(self, **{name: check_integer(name, getattr(self, name), at_least=least)})
        if self.sub_block_size is not None and self.block_size % self.sub_block_size:
            raise ValueError(
                f"sub_block_size is {self.sub_block_size} and block_size {self.block_size}; it "
                f"must divide block_size, or be None."
            )
        check_bool("lookahead", self.lookahead)
        if self.gate_gradient is not None:
            check_choice("gate_gradient", self.gate_gradient, ("bias",))
        check_choice("distillation", self.distillation, ("kept", "all", "none"))
        weight = check_number("distillation_weight", self.distillation_weight, at_least=0)
        dropout = check_dropout(self.dropout, name="dropout")
        set_checked(self, distillation_weight=weight, dropout=dropout)
        check_scale(self.scale, head_dim=1)
        check_backend_name(self.backend)

    @property
    def budget(self) -> Budget:
        """The budget that is given, or a tenth of the blocks."""
        ratio = self.sparsity_ratio
        if ratio is None and self.topk is None and self.mass is None:
            ratio = 0.1
        return Budget(self.topk, self.mass, ratio, self.local_blocks, self.sink_blocks)

    @property
    def positions_per_mean(self) -> int:
        """`sub_block_size`, or what stands for None."""
        if self.sub_block_size is not None:
            return self.sub_block_size
        return max(n for n in range(1, 17) if self.block_size % n == 0)


@dataclass(frozen=True, kw_only=True)
class AdaptiveHeads:
    """Sizes of the tensors of `AdaptiveSparseAttention`, which its gate depends on.

    Attributes:
        num_heads: H.
        head_dim: D.
        num_kv_heads: Heads of k and v, which divide `num_heads`; `num_heads` if None.
        device, dtype: Of the parameters of the gate.
    """

    num_heads: int = 12
    head_dim: int = 64
    num_kv_heads: int | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        set_checked(self, head_dim=check_integer("head_dim", self.head_dim, at_least=1))
        check_head_groups(self.num_heads, self.num_kv_heads)
        if self.dtype is not None:
            check_float_dtype(self.dtype)


@dataclass(frozen=True)
class AdaptiveSparseArguments(AdaptiveSparseConfig, AdaptiveHeads):
    """The signature of `AdaptiveSparseAttention`: two options are required."""

    num_heads: int = field()
    head_dim: int = field()


@dataclass(frozen=True)
class AdaptiveMultiheadArguments(AdaptiveSparseConfig, MultiheadConfig):
    """The signature of `AdaptiveSparseMultiheadAttention`: two options are required."""

    embed_dim: int = field()
    num_heads: int = field()
