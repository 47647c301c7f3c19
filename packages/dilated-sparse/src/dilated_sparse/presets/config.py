"""Options of MoBA and NSA as immutable objects. Each option is declared here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from dilated_core import MultiheadConfig
from dilated_core.checks import answers_names, check_choice, check_integer, set_checked
from dilated_core.inputs import check_backend_name, check_dropout, check_scale
from dilated_core.modules.config import FORWARD_ARGUMENTS

from dilated_sparse.presets.nsa import Mix, NSASizes


@answers_names(FORWARD_ARGUMENTS)
@dataclass(frozen=True, kw_only=True)
class MoBAConfig:
    """What `MoBAAttention` is built from; see `moba_attention`.

    Attributes:
        block_size: Positions of a block.
        topk: Blocks that a query sees, its own among them.
        scale: Factor of the scores; 1/√head_dim if None.
        dropout: Probability of dropping each attention probability in training mode.
        backend: `"auto"` or the name of a backend.

    Raises:
        TypeError: If a value has the wrong type, or an argument is unknown.
        ValueError: If a value is out of range.
    """

    block_size: int = 512
    topk: int = 3
    scale: float | None = None
    dropout: float = 0.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        set_checked(
            self,
            block_size=check_integer("block_size", self.block_size, at_least=1),
            topk=check_integer("topk", self.topk, at_least=1),
            dropout=check_dropout(self.dropout, name="dropout"),
        )
        check_scale(self.scale, head_dim=1)
        check_backend_name(self.backend)


@dataclass(frozen=True)
class MoBAMultiheadArguments(MoBAConfig, MultiheadConfig):
    """The signature of `MoBAMultiheadAttention`: both configs, with two required options."""

    embed_dim: int = field()
    num_heads: int = field()


@answers_names(FORWARD_ARGUMENTS)
@dataclass(frozen=True, kw_only=True)
class NSAConfig:
    """What `NativeSparseAttention` has beside its projections; defaults are the paper's.

    Attributes:
        compression_block_size, compression_stride, selection_block_size, num_selected_blocks,
            num_initial_blocks, num_local_blocks, window_size: See `NSASizes`.
        mix: `"gate"`, the paper's sum of three softmaxes with a learned gate each, or `"lse"`, one
            softmax over all three branches. See `native_sparse_attention`.
        scale: Factor of the scores; 1/√head_dim if None.
        backend: `"auto"` or the name of a backend.

    Raises:
        TypeError: If a value has the wrong type, or an argument is unknown.
        ValueError: If a value is out of range, or sizes do not fit together.
    """

    compression_block_size: int = 32
    compression_stride: int = 16
    selection_block_size: int = 64
    num_selected_blocks: int = 16
    num_initial_blocks: int = 1
    num_local_blocks: int = 2
    window_size: int = 512
    mix: Mix = "gate"
    scale: float | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        set_checked(self, **self.sizes.checked()._asdict())
        check_choice("mix", self.mix, get_args(Mix))
        check_scale(self.scale, head_dim=1)
        check_backend_name(self.backend)

    @property
    def sizes(self) -> NSASizes:
        """The sizes of the branches."""
        return NSASizes(*(getattr(self, name) for name in NSASizes._fields))


@dataclass(frozen=True)
class NSAArguments(NSAConfig, MultiheadConfig):
    """The signature of `NativeSparseAttention`: both configs, with two required options."""

    embed_dim: int = field()
    num_heads: int = field()
