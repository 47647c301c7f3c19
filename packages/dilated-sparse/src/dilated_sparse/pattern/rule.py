"""`PatternRule`: a kind of pattern and a fraction of blocks, for sequences of any length."""

from __future__ import annotations

from ast import literal_eval
from functools import lru_cache
from typing import NamedTuple

from dilated_sparse.pattern.blocks import BlockPattern
from dilated_sparse.pattern.generators import PatternType, pattern_of_type


class PatternRule(NamedTuple):
    """The arguments of `pattern_of_type` but for the number of blocks.

    A rule reaches the place where sequences are cut, so that each document gets the pattern of its
    own length.

    Attributes:
        text: pattern_type, sparsity_ratio and is_causal. A text, since compilers turn the numbers
            of a module into symbols, which have no `repr`.
    """

    text: str

    @classmethod
    def of(cls, pattern_type: PatternType, sparsity_ratio: float, is_causal: bool) -> PatternRule:
        """The rule of these arguments of `pattern_of_type`."""
        return cls(repr((pattern_type, sparsity_ratio, is_causal)))

    def pattern(self, num_blocks: int) -> BlockPattern:
        """The pattern of so many blocks; built once."""
        return _pattern(self.text, num_blocks)


@lru_cache(maxsize=128)
def _pattern(text: str, num_blocks: int) -> BlockPattern:
    kind, ratio, is_causal = literal_eval(text)
    return pattern_of_type(kind, num_blocks, sparsity_ratio=ratio, is_causal=is_causal)
