"""Options of the modules as immutable objects. Each option is declared here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field

from dilated_core import MultiheadConfig
from dilated_core.checks import answers_names, check_bool, check_choice, check_integer, set_checked
from dilated_core.inputs import check_backend_name, check_dropout, check_scale
from dilated_core.modules.config import FORWARD_ARGUMENTS

from dilated_sparse.pattern.blocks import BlockPattern
from dilated_sparse.pattern.generators import PATTERN_TYPES, PatternType
from dilated_sparse.pattern.ratio import check_ratio
from dilated_sparse.pattern.rule import PatternRule


@answers_names(FORWARD_ARGUMENTS)
@dataclass(frozen=True, kw_only=True)
class SparsePatternConfig:
    """A kind of pattern and the fraction of blocks it keeps, for sequences of any length.

    Attributes:
        pattern_type: `"local_window"`, `"dilated_sparse"`, `"global_local"` or `"hierarchical"`,
            see the functions of these names.
        sparsity_ratio: Fraction of blocks to *keep*, in (0, 1]: 0.1 is 90 % sparse. Causal
            attention counts the blocks at and below the diagonal.
        block_size: Positions of a block.

    Raises:
        TypeError: If a value has the wrong type, or an argument is unknown.
        ValueError: If a value is out of range.

    Example:
        >>> SparsePatternConfig(sparsity_ratio=0.25).pattern_for(1000)
        BlockPattern(num_blocks=16, num_heads=1, num_kept=64, sparsity_ratio=0.25)
    """

    pattern_type: PatternType = "dilated_sparse"
    sparsity_ratio: float = 0.1
    block_size: int = 64

    def __post_init__(self) -> None:
        check_choice("pattern_type", self.pattern_type, PATTERN_TYPES)
        set_checked(
            self,
            sparsity_ratio=check_ratio(self.sparsity_ratio),
            block_size=check_integer("block_size", self.block_size, at_least=1),
        )

    def pattern_for(self, seq_len: int, *, is_causal: bool = False) -> BlockPattern:
        """The pattern for this many positions; built once for each number of blocks.

        Args:
            seq_len: S.
            is_causal: Whether the attention is causal.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If there are fewer than 0 positions.
        """
        seq_len = check_integer("seq_len", seq_len, at_least=0)
        check_bool("is_causal", is_causal)
        rule = PatternRule.of(self.pattern_type, self.sparsity_ratio, is_causal)
        return rule.pattern(max(1, -(-seq_len // self.block_size)))


@answers_names(FORWARD_ARGUMENTS)
@dataclass(frozen=True, kw_only=True)
class BlockSparseAttentionConfig(SparsePatternConfig):
    """What `BlockSparseAttention` is built from: a `SparsePatternConfig` and options of the call.

    Attributes:
        scale: Factor of the scores; 1/√head_dim if None.
        dropout: Probability of dropping each attention probability in training mode.
        backend: `"auto"` or the name of a backend.

    Raises:
        TypeError, ValueError: As for `SparsePatternConfig`.
    """

    scale: float | None = None
    dropout: float = 0.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        SparsePatternConfig.__post_init__(self)
        check_scale(self.scale, head_dim=1)
        set_checked(self, dropout=check_dropout(self.dropout, name="dropout"))
        check_backend_name(self.backend)


@dataclass(frozen=True)
class BlockSparseMultiheadArguments(BlockSparseAttentionConfig, MultiheadConfig):
    """The signature of `BlockSparseMultiheadAttention`: both configs, with two required options."""

    embed_dim: int = field()
    num_heads: int = field()
