"""Blocks of dilated patterns against the dense counts that core materializes."""

import pytest
import torch
from dilated_core import DilatedPattern
from dilated_sparse import from_dilated, is_exact_for

CASES = [
    ([4], [1], 12, 2, 1),
    ([4], [1], 13, 4, 2),
    ([6], [1], 12, 4, 1),
    ([64], [1], 12, 4, 1),
    ([4, 16], [1, 4], 30, 2, 4),
    ([8, 32], [2, 8], 50, 4, 3),
    ([5, 11], [1, 3], 23, 3, 2),
]


@pytest.mark.parametrize("head_offsets", ["interleaved", "blocked"])
@pytest.mark.parametrize(("w", "r", "S", "size", "H"), CASES)
def test_a_block_is_kept_where_any_pair_is(w, r, S: int, size: int, H: int, head_offsets) -> None:
    dilated = DilatedPattern(w, r, head_offsets=head_offsets)
    counts = dilated.materialize(S, H)
    N = -(-S // size)
    padded = torch.zeros(H, N * size, N * size)
    padded[:, :S, :S] = counts
    touched = padded.view(H, N, size, N, size).amax((2, 4)) > 0
    pattern = from_dilated(dilated, S, size, H)
    assert torch.equal(pattern.materialize(num_heads=H), touched | torch.eye(N, dtype=torch.bool))
    # Exact means: the same keys, each once, as the kept blocks have.
    wide = pattern.materialize(num_heads=H).repeat_interleave(size, 1).repeat_interleave(size, 2)
    assert is_exact_for(dilated, S, size) == torch.equal(wide[:, :S, :S].to(counts.dtype), counts)


def test_attended_padding_is_never_exact() -> None:
    assert not is_exact_for(DilatedPattern([4], [1], padding="attended"), 8, 4)
