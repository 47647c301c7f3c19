"""Scores beside their definition written as loops, and the blocks that budgets keep."""

import math

import pytest
import torch
from dilated_sparse import AdaptiveSparseAttention
from dilated_sparse.adaptive.choice import Budget, Rows, kept_blocks
from dilated_sparse.adaptive.gate import BlockGate
from dilated_sparse.adaptive.scores import Shape, block_scores, key_terms, query_terms
from hypothesis import given, settings
from hypothesis import strategies as st


def mean(x: torch.Tensor) -> torch.Tensor:
    return x.double().mean(0)


def of_unit_size(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean() + 1e-6).sqrt()


def features(x: torch.Tensor) -> torch.Tensor:
    """Mean, maximum and minimum over positions and heads of `(s, G, D)`."""
    if not len(x):
        return x.new_zeros(3 * x.shape[2])
    x = x.double().flatten(0, 1)
    return of_unit_size(torch.cat([x.mean(0), x.amax(0), x.amin(0)]))


def defined_scores(
    q: torch.Tensor, k: torch.Tensor, gate: BlockGate, head: int, i: int, *, own: bool, causal: bool
) -> list[float]:
    """Row i of q `(S, G, D)` and k `(S, 1, D)`, blocks of 8 in sub-blocks of 2, scale 0.5."""
    start = i * 8
    of_block = [(b, b + 2) for b in range(start, start + 8, 2)]
    before = [(start - 8, start)] if i else []
    terms = of_block if own else [*before, (start, start + 1)]
    seen = range(0, start if causal else len(k), 2)
    shares = dict.fromkeys(seen, 0.0)
    for a, stop in terms:
        rows = q[a:stop]
        for h in range(q.shape[1] if len(rows) else 0):
            masses = {
                b: len(k[b : b + 2]) / 2 * math.exp(mean(rows[:, h]) @ mean(k[b : b + 2, 0]) * 0.5)
                for b in seen
            }
            for b, mass in masses.items():
                shares[b] += len(rows) / (stop - a) * mass / sum(masses.values())
    read = q[start : start + 8] if own else q[max(0, start - 8) : start]
    f = torch.cat([features(read), of_unit_size(q[start].double().mean(0))])
    (A1, A2), (B1, B2) = gate.query_weight[:, head], gate.key_weight[:, head]
    scores = []
    for j in range(i if causal else -(-len(k) // 8)):
        total = 0.0
        for b in range(j * 8, j * 8 + 8, 2):
            if not len(k[b : b + 2]):
                continue
            g = features(k[b : b + 2])
            gain = ((f @ A1) @ (g @ B1) - (f @ A2) @ (g @ B2)) / math.sqrt(A1.shape[1])
            distance = max(0, (start - b) // 2, (b - start - 6) // 2)
            step = 0 if distance == 0 else 1 + int(2 * math.log2(distance))
            gain += gate.distance_bias[head, step] + g @ gate.distance_weight[head, :, step]
            total += shares[b] * math.exp(gain)
        scores.append(math.log(total) * (1 + float(gate.sharpness[head])))
    return scores


@pytest.mark.parametrize(("own", "causal"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("S", [40, 37])
def test_scores_are_their_definition(S: int, own: bool, causal: bool) -> None:
    torch.manual_seed(S)
    q, k = torch.randn(1, S, 4, 6).double(), torch.randn(1, S, 2, 6).double()
    gate, shape = BlockGate(2, 6, 3, dtype=torch.float64).requires_grad_(False), Shape(2, 8, 2)
    for weight in gate.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    queries = query_terms(q, q, shape, None, gate, reads_own_block=own)
    keys = key_terms(k, k, shape, None, gate)
    scores = block_scores(queries, keys, 0.5, first_row=0, is_causal=causal)
    part = block_scores(queries.rows(2, 4), keys, 0.5, first_row=2, is_causal=causal)
    for head in range(2):
        rows = q[0, :, 2 * head : 2 * head + 2], k[0, :, head, None]
        for i in range(5):
            wanted = defined_scores(*rows, gate, head, i, own=own, causal=causal)
            wanted = torch.tensor(wanted, dtype=torch.float64)
            torch.testing.assert_close(scores[0, head, i, : len(wanted)], wanted)
            if 2 <= i < 4:
                torch.testing.assert_close(part[0, head, i - 2, : len(wanted)], wanted)


@pytest.mark.parametrize("is_causal", [False, True])
def test_before_training_the_gate_changes_no_bit(is_causal: bool) -> None:
    q, k = torch.randn(2, 90, 4, 8), torch.randn(2, 90, 2, 8)
    shape = Shape(2, 16, 16)
    gate = BlockGate(2, 8, 5)
    own = {"reads_own_block": not is_causal}
    rows = {"first_row": 0, "is_causal": is_causal}
    learned = query_terms(q, q, shape, None, gate, **own), key_terms(k, k, shape, None, gate)
    plain = query_terms(q, q, shape, None, None, **own), key_terms(k, k, shape, None, None)
    assert torch.equal(block_scores(*learned, 0.3, **rows), block_scores(*plain, 0.3, **rows))


def test_huge_corrections_stay_finite() -> None:
    q, k = torch.randn(1, 90, 2, 8), torch.randn(1, 90, 2, 8)
    shape, gate = Shape(2, 16, 16), BlockGate(2, 8, 5)
    with torch.no_grad():
        gate.query_weight[0] *= 1e4
    queries = query_terms(q, q, shape, None, gate, reads_own_block=True)
    scores = block_scores(
        queries, key_terms(k, k, shape, None, gate), 0.3, first_row=0, is_causal=False
    )
    assert scores.isfinite().all()
    scores.sum().backward()
    assert all(weight.grad.isfinite().all() for weight in gate.parameters())


budgets = st.one_of(
    st.builds(lambda k: {"topk": k}, st.integers(1, 9)),
    st.builds(lambda p: {"mass": p}, st.floats(0.05, 1)),
    st.builds(lambda r: {"sparsity_ratio": r}, st.floats(0.01, 1)),
)


@given(
    budgets,
    st.integers(1, 9),
    st.integers(0, 2),
    st.integers(0, 2),
    st.booleans(),
    st.integers(0, 9),
)
@settings(deadline=None, max_examples=60)
def test_budgets(budget: dict, N: int, local: int, sinks: int, is_causal: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 2, N, N, generator=generator).round(decimals=0)  # with ties
    limits = Budget(*(budget.get(x) for x in ("topk", "mass", "sparsity_ratio")), local, sinks)
    kept = kept_blocks(scores, limits, Rows(0, N, is_causal, None))
    for b in range(2):
        for head in range(2):
            for i in range(N):
                there = list(range(i + 1 if is_causal else N))
                forced = [j for j in there if j == i or abs(i - j) <= local or j < sinks]
                row = scores[b, head, i].tolist()
                rest = sorted(set(there) - set(forced), key=lambda j: (-row[j], j))
                if "topk" in budget:
                    number = budget["topk"]
                elif "sparsity_ratio" in budget:
                    number = max(1, round(budget["sparsity_ratio"] * len(there)))
                else:
                    counted = [j for j in there if not (is_causal and j == i)]
                    total = sum(math.exp(row[j]) for j in counted)
                    held = sum(math.exp(row[j]) for j in forced if j in counted)
                    number = len(forced)
                    for j in rest:
                        if budget["mass"] < 1 and held / total >= budget["mass"] - 1e-6:
                            break
                        held, number = held + math.exp(row[j]), number + 1
                expected = forced + rest[: max(0, number - len(forced))]
                assert kept[b, head, i].nonzero().flatten().tolist() == sorted(expected)


def test_lists_are_packed_to_the_left_and_each_row_and_head_has_its_own() -> None:
    q, k = torch.randn(2, 128, 4, 8) * 3, torch.randn(2, 128, 2, 8) * 3
    attention = AdaptiveSparseAttention(
        num_heads=4, head_dim=8, num_kv_heads=2, topk=4, block_size=8, sink_blocks=0
    )
    selection = attention.select(q, k, is_causal=True)
    kept = selection.materialize()
    assert selection.counts.tolist()[0][0] == [1, 2, 3] + [4] * 13
    for row, count, mask in zip(
        selection.block_indices.flatten(0, 2), selection.counts.flatten(), kept.flatten(0, 2),
        strict=True,
    ):  # fmt: skip
        assert row[:count].tolist() == mask.nonzero().flatten().tolist()
        assert (row[count:] == -1).all()
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[:, 0], kept[:, 1])
    assert torch.equal(selection.pattern(1).materialize(), kept[1])


def test_strips_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(2, 100, 4, 8).double(), torch.randn(2, 100, 2, 8).double()
    attention = AdaptiveSparseAttention(num_heads=4, head_dim=8, num_kv_heads=2, block_size=8)
    for is_causal in (False, True):
        whole = attention.select(q, k, is_causal)
        monkeypatch.setattr("dilated_sparse.adaptive.scores._STRIP", 1)
        for a, b in zip(whole, attention.select(q, k, is_causal), strict=True):
            assert torch.equal(a, b)
        monkeypatch.undo()
