"""What a picture of a pattern holds: the keys of each query, branch by branch, and colours."""

from __future__ import annotations

from dataclasses import dataclass

from dilated_core import DilatedPattern
from dilated_core.checks import check_integer
from dilated_core.pattern.visible import visible_keys

MOST_POSITIONS = 2048
MOST_HEADS = 64
# Of the branches, in their order; told apart with the usual kinds of colour blindness.
COLOURS = ("#4263eb", "#f59f00", "#0ca678", "#e64980", "#15aabf", "#7048e8", "#82c91e", "#a47148")
SEVERAL = "#212529"
NONE = "#f1f3f5"


@dataclass(frozen=True, kw_only=True, slots=True)
class PatternPicture:
    """A pattern at one number of heads and positions.

    Args:
        pattern: At most eight branches.
        num_heads: H, up to 64.
        seq_len: S, up to 2,048, so that a picture has a pixel for each query and key.
        is_causal: Whether a query sees only its own position and earlier ones.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If there are more branches, heads or positions than a picture can show.
    """

    pattern: DilatedPattern
    num_heads: int
    seq_len: int
    is_causal: bool

    def __post_init__(self) -> None:
        for name, most in (("num_heads", MOST_HEADS), ("seq_len", MOST_POSITIONS)):
            value = check_integer(name, getattr(self, name), at_least=1)
            if value > most:
                raise ValueError(
                    f"{name} is {value}; a picture shows at most {most:,}, so draw a smaller one: "
                    f"a pattern repeats after its longest segment, and after its largest rate "
                    f"among the heads."
                )
        if len(self.pattern.branches) > len(COLOURS):
            raise ValueError(
                f"segment_lengths has {len(self.pattern.branches)} branches; a picture has colours "
                f"for at most {len(COLOURS)}, so draw some of them."
            )

    def keys(self, head: int, query: int) -> tuple[range, ...]:
        """The positions that a query sees by each branch."""
        return visible_keys(
            self.pattern,
            query,
            head,
            num_heads=self.num_heads,
            seq_len=self.seq_len,
            is_causal=self.is_causal,
        ).positions

    @property
    def legend(self) -> list[tuple[str, str]]:
        """A colour and its meaning, in the order to show them."""
        branches = [
            (colour, f"w = {w:,}, r = {r:,}")
            for colour, (w, r) in zip(COLOURS, self.pattern.branches, strict=False)
        ]
        several = (SEVERAL, "several branches: counts once for each")
        return branches if len(branches) == 1 else [*branches, several]

    @property
    def title(self) -> str:
        """What the picture shows."""
        causal = "causal" if self.is_causal else "not causal"
        return f"Which keys each query sees: {self.seq_len:,} positions, {causal}"
