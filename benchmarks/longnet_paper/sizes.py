"""The lengths, models and numbers of tokens, from 1/16 of the paper's lengths upwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dilated_core import DilatedPattern

# Section 4 of the paper: 12 heads and layers of 768.
PAPER_SEGMENTS = (2048, 4096, 8192, 16384, 32768)
PAPER_RATES = (1, 2, 4, 6, 12)


@dataclass(frozen=True)
class Size:
    """What all experiments on text share.

    Attributes:
        scale: Lengths are `scale` / 16 of the paper's. The committed results have 1; 16 has the
            paper's lengths, width and depth, and far fewer tokens.
    """

    scale: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.scale <= 16:
            raise ValueError(f"scale is {self.scale}; it must be from 1 to 16.")

    @property
    def short(self) -> int:
        """Length of the shortest segment, and of the windows that dense attention trains on."""
        return PAPER_SEGMENTS[0] * self.scale // 16

    @property
    def long(self) -> tuple[int, ...]:
        """Lengths of the windows that LongNet and fixed-sparse attention train on.

        The paper also has 16,384, which scale 1 leaves out to be done in minutes.
        """
        kept = PAPER_SEGMENTS[2::2] if self.scale == 1 else PAPER_SEGMENTS[2:]
        return tuple(length * self.scale // 16 for length in kept)

    @property
    def scored(self) -> tuple[int, ...]:
        """Lengths of the windows that are scored, as in the columns of Table 2."""
        return (self.short, self.long[0], self.long[-1])

    @property
    def tokens_per_step(self) -> int:
        """One window of the longest, 16 of the shortest; the paper has 16 times as many windows."""
        return self.long[-1]

    @property
    def steps(self) -> int:
        """Optimizer steps of each training."""
        return 750 * self.scale

    @property
    def num_heads(self) -> int:
        """The paper's, but at scale 1, where a head would have too few dimensions."""
        return 8 if self.scale == 1 else 12

    def pattern(self, seq_len: int) -> DilatedPattern:
        """LongNet's branches whose segments are not longer than the windows it trains on.

        A rate above the number of heads would leave positions that no head sees.
        """
        segments = [length * self.scale // 16 for length in PAPER_SEGMENTS]
        kept = [w for w in segments if w <= seq_len]
        return DilatedPattern(kept, [min(r, self.num_heads) for r in PAPER_RATES[: len(kept)]])

    def model(self, pattern: DilatedPattern) -> dict[str, Any]:
        """Arguments of `LongNetConfig`."""
        d_model = 64 if self.scale == 1 else 96 * min(self.scale, 8)
        return {
            "num_tokens": 256,
            "d_model": d_model,
            "nhead": self.num_heads,
            "num_decoder_layers": min(2 * self.scale, 12),
            "dim_feedforward": 2 * d_model if self.scale < 16 else 4 * d_model,
            "positions": "rotary",
            "key_conv": 4,
            "tie_embeddings": True,
            "segment_lengths": pattern.segment_lengths,
            "dilation_rates": pattern.dilation_rates,
        }
