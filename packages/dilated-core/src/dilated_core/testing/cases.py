"""Shapes and patterns to test with: the awkward ones by hand, all others by hypothesis."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st

from dilated_core.pattern import DilatedPattern


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shape, pattern and causality of one attention call.

    Attributes:
        batch_size, seq_len, num_heads, head_dim: B, S, H, D.
        pattern: The branches.
        num_kv_heads: Heads of k and v; H if None.
        is_causal: Whether queries see only the past.
        scale: Factor of the scores; 1/√D if None.
        name: For test ids.
    """

    seq_len: int
    pattern: DilatedPattern
    batch_size: int = 1
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int = 8
    is_causal: bool = False
    scale: float | None = None
    name: str = field(default="", compare=False)

    def tensors(
        self, *, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v with `requires_grad`, and a random upstream gradient of out, `(B, S, H, D)`."""
        generator = torch.Generator().manual_seed(seed)
        H, H_kv = self.num_heads, self.num_kv_heads or self.num_heads
        q, k, v, dout = (
            # Drawn in float64, so that every dtype and device sees the same numbers.
            torch.randn(
                (self.batch_size, self.seq_len, heads, self.head_dim),
                generator=generator,
                dtype=torch.float64,
            ).to(device, dtype)
            for heads in (H, H_kv, H_kv, H)
        )
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def _awkward() -> tuple[Case, ...]:
    def pattern(lengths: list[int], rates: list[int], **options: str) -> DilatedPattern:
        return DilatedPattern(lengths, rates, **options)  # pyright: ignore[reportArgumentType]

    blocked_attended = {"head_offsets": "blocked", "padding": "attended"}
    cases = {
        "one position": Case(seq_len=1, pattern=pattern([4, 8], [1, 2])),
        "dense": Case(seq_len=40, pattern=pattern([40], [1])),
        "even": Case(seq_len=64, pattern=pattern([16, 32, 64], [1, 2, 4])),
        "tail": Case(seq_len=77, pattern=pattern([16, 32], [1, 2])),
        "tail of one": Case(seq_len=33, pattern=pattern([16, 32], [1, 2])),
        "tail, batch": Case(seq_len=77, batch_size=3, pattern=pattern([16, 32], [1, 2])),
        "tail, large batch": Case(seq_len=20, batch_size=5, pattern=pattern([16], [2])),
        "w beyond S": Case(seq_len=20, pattern=pattern([64, 128], [1, 4])),
        "r does not divide w": Case(seq_len=64, num_heads=7, pattern=pattern([16, 32], [3, 5])),
        "r beyond w": Case(seq_len=30, num_heads=8, pattern=pattern([4, 8], [6, 1])),
        "H below r": Case(seq_len=48, num_heads=3, pattern=pattern([16, 48], [1, 8])),
        "H not a multiple of r": Case(seq_len=48, num_heads=6, pattern=pattern([8, 24], [1, 4])),
        "one head": Case(seq_len=50, num_heads=1, pattern=pattern([10, 50], [1, 5])),
        "empty rows": Case(seq_len=32, num_heads=2, pattern=pattern([8, 32], [4, 8])),
        "branch twice": Case(seq_len=32, pattern=pattern([8, 8, 16], [1, 1, 1])),
        "dilated first": Case(seq_len=40, pattern=pattern([40, 8], [4, 1])),
        "odd head_dim": Case(seq_len=24, head_dim=5, pattern=pattern([8, 24], [1, 3])),
        "head_dim 1": Case(seq_len=24, head_dim=1, pattern=pattern([8, 24], [1, 3])),
        "blocked": Case(
            seq_len=50, num_heads=6, pattern=pattern([16, 50], [1, 4], head_offsets="blocked")
        ),
        "grouped queries": Case(
            seq_len=50, num_heads=6, num_kv_heads=2, pattern=pattern([16, 50], [1, 4])
        ),
        "one kv head": Case(
            seq_len=33, num_heads=5, num_kv_heads=1, batch_size=2, pattern=pattern([16], [3])
        ),
        "scale": Case(seq_len=40, pattern=pattern([16, 40], [1, 4]), scale=0.9),
        "negative scale": Case(seq_len=40, pattern=pattern([16, 40], [1, 4]), scale=-0.9),
        "zero scale": Case(seq_len=40, pattern=pattern([16, 40], [1, 4]), scale=0.0),
        "attended": Case(seq_len=77, pattern=pattern([10, 24, 60], [1, 2, 4], **blocked_attended)),
        "attended, r does not divide w": Case(
            seq_len=41, num_heads=5, pattern=pattern([10, 41], [3, 4], padding="attended")
        ),
    }
    return tuple(
        replace(case, name=f"{name}{', causal' * is_causal}", is_causal=is_causal)
        for name, case in cases.items()
        for is_causal in (False, True)
    )


AWKWARD_CASES = _awkward()
"""Each shape that has broken an implementation of dilated attention, causal and not."""


@st.composite
def random_cases(
    draw: st.DrawFn, *, max_seq_len: int = 64, max_heads: int = 9, max_branches: int = 4
) -> Case:
    """Hypothesis strategy: any pattern on any shape, small enough for the oracle."""
    branches = draw(
        st.lists(
            st.tuples(st.integers(1, max_seq_len + 20), st.integers(1, 13)),
            min_size=1,
            max_size=max_branches,
        )
    )
    num_heads = draw(st.integers(1, max_heads))
    return Case(
        batch_size=draw(st.integers(1, 3)),
        seq_len=draw(st.integers(1, max_seq_len)),
        num_heads=num_heads,
        num_kv_heads=draw(st.sampled_from([h for h in range(1, 10) if num_heads % h == 0])),
        scale=draw(st.sampled_from([None, 0.3, 0.0, -1.0])),
        head_dim=draw(st.sampled_from([1, 2, 5, 8])),
        is_causal=draw(st.booleans()),
        pattern=DilatedPattern(
            [w for w, _ in branches],
            [r for _, r in branches],
            head_offsets=draw(st.sampled_from(["interleaved", "blocked"])),
            padding=draw(st.sampled_from(["masked", "attended"])),
        ),
    )
