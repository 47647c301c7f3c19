"""Shapes and patterns to test with: the awkward ones by hand, all others by hypothesis."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from hypothesis import strategies as st

from dilated_core.pattern.branches import DilatedPattern


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shape, pattern and causality of one attention call.

    Attributes:
        batch_size, seq_len, num_heads, head_dim: B, S, H, D.
        pattern: The branches.
        num_kv_heads: Heads of k and v; H if None.
        is_causal: Whether queries see only the past.
        scale: Factor of the scores; 1/√D if None.
        masked: Share of the keys that a key padding mask hides, drawn at random; None: no mask.
        documents: Lengths of the documents that are packed into one sequence; then S is their sum
            and there is no batch.
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
    masked: float | None = None
    documents: tuple[int, ...] = ()
    name: str = field(default="", compare=False)

    def options(self, *, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Keywords of the call, for `dilated_attention` and the oracle alike."""
        mask = cu_seqlens = None
        if self.masked is not None:
            generator = torch.Generator().manual_seed(1)
            shape = (self.batch_size, self.seq_len)
            mask = (torch.rand(shape, generator=generator) < self.masked).to(device)
        if self.documents:
            bounds = [0, *accumulate(self.documents)]
            cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
        return {
            "is_causal": self.is_causal,
            "scale": self.scale,
            "key_padding_mask": mask,
            "cu_seqlens": cu_seqlens,
        }

    def tensors(
        self, *, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v with `requires_grad`, and a random upstream gradient of out.

        `(B, S, H, D)`, or `(S, H, D)` with documents.
        """
        generator = torch.Generator().manual_seed(seed)
        H, H_kv = self.num_heads, self.num_kv_heads or self.num_heads
        rows = (sum(self.documents),) if self.documents else (self.batch_size, self.seq_len)
        q, k, v, dout = (
            # Drawn in float64, so that every dtype and device sees the same numbers.
            torch.randn(
                (*rows, heads, self.head_dim),
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
        "grouped queries, r beyond the group": Case(
            seq_len=50, num_heads=8, num_kv_heads=4, pattern=pattern([16, 50], [1, 4])
        ),
        "grouped queries, r divides the group": Case(
            seq_len=50, num_heads=8, num_kv_heads=2, pattern=pattern([16, 50, 50], [1, 2, 4])
        ),
        "grouped queries, blocked": Case(
            seq_len=50,
            num_heads=12,
            num_kv_heads=3,
            pattern=pattern([16, 30], [3, 5], head_offsets="blocked"),
        ),
        "masked": Case(seq_len=50, batch_size=2, masked=0.4, pattern=pattern([16, 50], [1, 4])),
        "masked, empty rows": Case(
            seq_len=40, batch_size=3, masked=0.8, pattern=pattern([4, 8], [1, 2])
        ),
        "masked altogether": Case(seq_len=20, masked=1.0, pattern=pattern([8, 20], [1, 2])),
        "masked, grouped queries, attended": Case(
            seq_len=77,
            batch_size=2,
            masked=0.5,
            num_heads=6,
            num_kv_heads=2,
            pattern=pattern([10, 24, 60], [1, 2, 4], **blocked_attended),
        ),
        "packed": Case(seq_len=75, documents=(20, 1, 7, 7, 40), pattern=pattern([8, 32], [1, 4])),
        "packed, equal documents": Case(
            seq_len=48,
            documents=(16, 16, 16),
            num_heads=6,
            num_kv_heads=3,
            pattern=pattern([8, 32], [1, 4], padding="attended"),
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
    draw: st.DrawFn,
    *,
    max_seq_len: int = 64,
    max_heads: int = 9,
    max_branches: int = 4,
    with_options: bool = False,
) -> Case:
    """Hypothesis strategy: any pattern on any shape, small enough for the oracle.

    `with_options` also draws key padding masks and packed documents.
    """
    branches = draw(
        st.lists(
            st.tuples(st.integers(1, max_seq_len + 20), st.integers(1, 13)),
            min_size=1,
            max_size=max_branches,
        )
    )
    num_heads = draw(st.integers(1, max_heads))
    seq_len = draw(st.integers(1, max_seq_len))
    kind = draw(st.sampled_from(["plain", "masked", "packed"])) if with_options else "plain"
    documents: tuple[int, ...] = ()
    if kind == "packed":
        documents = tuple(draw(st.lists(st.integers(1, max_seq_len // 2), min_size=1, max_size=5)))
        seq_len = sum(documents)
    return Case(
        batch_size=1 if documents else draw(st.integers(1, 3)),
        seq_len=seq_len,
        documents=documents,
        masked=draw(st.sampled_from([0.1, 0.5, 0.9])) if kind == "masked" else None,
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
