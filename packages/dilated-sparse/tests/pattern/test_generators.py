"""Each kind of pattern against its definition, entry by entry, and against its budget."""

import random
import tracemalloc

import numpy as np
import pytest
import torch
from dilated_sparse import (
    BlockPattern,
    dilated_sparse,
    global_local,
    hierarchical,
    local_window,
    pattern_of_type,
    random_blocks,
)
from dilated_sparse.pattern.generators import PATTERN_TYPES

SIZES = [1, 2, 3, 7, 16, 33]


def dense(pattern: BlockPattern) -> torch.Tensor:
    return pattern.materialize()[0]


def expected(N: int, rule, is_causal: bool) -> torch.Tensor:
    kept = torch.tensor([[bool(rule(i, j)) for j in range(N)] for i in range(N)])
    return kept.tril() if is_causal else kept


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("N", SIZES)
def test_closed_forms(N: int, is_causal: bool) -> None:
    for w in (0, 1, 3, 40):
        got = local_window(N, window=w, is_causal=is_causal)
        assert torch.equal(dense(got), expected(N, lambda i, j, w=w: abs(i - j) <= w, is_causal))
        for g in (0, 1, N):
            got = global_local(N, window=w, num_global=g, is_causal=is_causal)
            rule = lambda i, j: abs(i - j) <= w or i < g or j < g  # noqa: B023, E731
            assert torch.equal(dense(got), expected(N, rule, is_causal))
    for levels in (1, 3, None):
        L = levels or 40

        def near(i: int, j: int) -> bool:
            return i == j or any(
                j % 2**level == 0 and abs(i // 2**level - j // 2**level) <= 1
                for level in range(L)  # noqa: B023
            )

        got = hierarchical(N, levels=levels, is_causal=is_causal)
        assert torch.equal(dense(got), expected(N, near, is_causal))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("ratio", [0.001, 0.02, 0.1, 0.37, 0.5, 1.0])
@pytest.mark.parametrize("N", [1, 2, 5, 31, 64, 100])
@pytest.mark.parametrize("kind", PATTERN_TYPES)
def test_the_fraction_is_met_and_the_diagonal_kept(
    kind, N: int, ratio: float, is_causal: bool
) -> None:
    pattern = pattern_of_type(kind, N, sparsity_ratio=ratio, is_causal=is_causal)
    kept = dense(pattern)
    assert kept.diagonal().all()
    assert not (is_causal and kept.triu(1).any())
    counts = kept.sum(1)
    wanted = ratio * (torch.arange(N) + 1 if is_causal else torch.full((N,), N))
    if kind != "global_local":
        assert ((counts - wanted).abs() <= 1).all()
    assert abs(counts.sum() - wanted.sum()) <= N
    assert pattern == pattern_of_type(kind, N, sparsity_ratio=ratio, is_causal=is_causal)
    if ratio == 1:
        assert kept.sum() == (N * (N + 1) // 2 if is_causal else N * N)


def ranks(kind: str, i: int, j: int, sinks: int, num_blocks: int) -> tuple:
    """What a kind of pattern keeps first: the lowest of these; the definition."""
    d = abs(i - j)
    near = (d, j > i)
    if kind == "dilated_sparse":
        return (d and d // (d & -d), *near)
    if kind == "global_local":
        return (0 if i == j else 1 if j < sinks else 2, *near)
    if kind == "hierarchical":
        levels = [n for n in range((num_blocks - 1).bit_length() + 1) if j % 2**n == 0]
        return (min((abs((i >> n) - (j >> n)), n) for n in levels), *near)
    return near


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", PATTERN_TYPES)
def test_rows_keep_the_blocks_that_rank_first(kind, is_causal: bool) -> None:
    for N, ratio in ((1, 0.5), (6, 0.4), (23, 0.07), (23, 0.3), (40, 0.2), (40, 0.8)):
        pattern = pattern_of_type(kind, N, sparsity_ratio=ratio, is_causal=is_causal)
        for i in range(N):
            kept = pattern.row(i).tolist()
            if kind == "global_local" and not is_causal and len(kept) == N:
                continue  # the full row of a sink
            there = range(i + 1 if is_causal else N)
            budget = ratio * len(there)
            causal_sinks = 0 if budget < 2 else max(1, round(budget / 8))
            sinks = causal_sinks if is_causal else int(dense(pattern).all(1).sum())
            best = sorted(there, key=lambda j: ranks(kind, i, j, sinks, N))
            assert kept == sorted(best[: len(kept)])


@pytest.mark.exhaustive
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", PATTERN_TYPES)
def test_a_million_blocks_take_time_and_memory_for_the_kept_ones(kind, is_causal: bool) -> None:
    """Ranking all blocks of each row would be 10¹² numbers, hours."""
    N = 10**6
    tracemalloc.start()
    pattern = pattern_of_type(kind, N, sparsity_ratio=4e-6, is_causal=is_causal)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pattern.num_blocks == N
    assert N <= pattern.num_kept <= 5 * N
    assert peak < 1000 * N


def test_strided_diagonals_have_a_radius_that_grows_with_the_rate() -> None:
    pattern = dilated_sparse(256, sparsity_ratio=0.1)
    distances = pattern.row(128).sub(128).abs().unique().tolist()[1:]
    odd = {d: d // (d & -d) for d in range(1, 256)}
    largest = max(odd[d] for d in distances)
    # Complete below the largest odd part: rate 2^l is kept to the radius (largest − 2) · 2^l.
    assert set(distances) >= {d for d in range(1, 128) if odd[d] < largest}
    for level in range(4):
        assert 2**level * (largest - 2) in distances


def test_sinks_are_blocks_and_stay_few() -> None:
    pattern = pattern_of_type("global_local", 256, sparsity_ratio=0.1)
    kept = dense(pattern)
    full_rows, full_columns = (int(kept.all(d).sum()) for d in (1, 0))
    assert full_rows == full_columns == 3
    causal = dense(pattern_of_type("global_local", 256, sparsity_ratio=0.1, is_causal=True))
    # A row has sinks for its own budget: an eighth of 0.1 · 256 blocks, or of 0.1 · 65.
    assert int(causal[250:, :128].all(0).sum()) == 3
    assert int(causal[64:].all(0).sum()) == 1
    assert int(causal[3:].all(1).sum()) == 0


def test_random_blocks_follow_the_seed_alone() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    a = random_blocks(30, num_random=4, seed=1, num_heads=2)
    assert a == random_blocks(30, num_random=4, seed=1, num_heads=2)
    assert a != random_blocks(30, num_random=4, seed=2, num_heads=2)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist()
    assert states[2] == random.getstate()
    kept = a.materialize()
    assert not torch.equal(kept[0], kept[1])
    assert kept.diagonal(dim1=1, dim2=2).all()
    assert (kept.sum(-1) == 5).all()
    causal = random_blocks(30, num_random=4, seed=1, is_causal=True)
    assert not dense(causal).triu(1).any()
    assert dense(causal).sum(1).tolist() == [min(i, 4) + 1 for i in range(30)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dilated_sparse(8, sparsity_ratio=0), "sparsity_ratio is 0"),
        (lambda: dilated_sparse(8, sparsity_ratio=1.5), "at most 1"),
        (lambda: dilated_sparse(8, sparsity_ratio=-0.1), "sparsity_ratio is -0.1"),
        (lambda: dilated_sparse(8, sparsity_ratio=float("nan")), "sparsity_ratio is nan"),
        (lambda: dilated_sparse(0, sparsity_ratio=0.1), "num_blocks is 0"),
        (lambda: local_window(8, window=-1), "window is -1"),
        (lambda: global_local(8, window=1, num_global=9), "num_global is 9"),
        (lambda: hierarchical(8, levels=0), "levels is 0"),
        (lambda: random_blocks(8, num_random=-1), "num_random is -1"),
        (lambda: pattern_of_type("learned", 8, sparsity_ratio=0.1), "pattern_type is 'learned'"),
    ],
)
def test_wrong_numbers_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("kind", PATTERN_TYPES)
def test_a_longer_sequence_does_not_change_causal_rows(kind, ratio: float) -> None:
    whole = pattern_of_type(kind, 200, sparsity_ratio=ratio, is_causal=True)
    for n in (1, 2, 7, 64, 100, 199):
        assert pattern_of_type(kind, n, sparsity_ratio=ratio, is_causal=True) == whole.leading(n)
