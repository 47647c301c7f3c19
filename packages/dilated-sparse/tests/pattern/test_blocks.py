"""The value itself: lists, heads, set operations, shorter sequences, errors."""

import copy
import pickle

import pytest
import torch
from dilated_sparse import (
    BlockPattern,
    block_sparse_attention,
    from_dilated,
    global_local,
    is_exact_for,
    local_window,
    random_blocks,
)

THREE = BlockPattern.from_rows([[0], [1, 0], [0, 2]])


def test_materialize_shows_the_lists() -> None:
    dense = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    assert torch.equal(THREE.materialize(num_heads=2), dense.expand(2, 3, 3))
    assert BlockPattern.from_mask(dense) == THREE
    assert [THREE.row(i).tolist() for i in range(3)] == [[0], [0, 1], [0, 2]]
    assert THREE.num_kept == 5
    assert THREE.sparsity_ratio == 5 / 9
    assert THREE.causal_sparsity_ratio == 5 / 6


def test_memory_is_that_of_kept_blocks() -> None:
    pattern = local_window(20_000, window=1)
    assert pattern.block_indices.numel() == 3 * 20_000 - 2
    assert pattern.row_offsets.numel() == 20_001


def test_heads_may_differ_and_are_shared_by_groups() -> None:
    other = BlockPattern.from_rows([[2], [1], [0]])
    both = BlockPattern.per_head([THREE, other])
    assert both.num_heads == 2
    dense = both.materialize(num_heads=4)
    assert torch.equal(dense[1], THREE.materialize()[0])
    assert torch.equal(dense[2], other.materialize()[0])
    assert both.row(0, head=1).tolist() == [2]
    with pytest.raises(ValueError, match="lists 2 heads and there are 3"):
        both.materialize(num_heads=3)


@pytest.mark.parametrize("seed", range(5))
def test_union_and_intersection_are_those_of_the_masks(seed: int) -> None:
    a = random_blocks(9, num_random=3, seed=seed)
    b = random_blocks(9, num_random=2, seed=seed + 50, num_heads=2)
    dense = [x.materialize(num_heads=2) for x in (a, b)]
    assert torch.equal((a | b).materialize(), dense[0] | dense[1])
    assert torch.equal((b & a).materialize(), dense[0] & dense[1])
    assert (a | a) == (a & a) == a


def test_parts_are_those_of_the_mask() -> None:
    pattern = BlockPattern.per_head(
        [global_local(7, window=1, num_global=2), local_window(7, window=2)]
    )
    dense = pattern.materialize()
    assert torch.equal(pattern.causal().materialize(), dense.tril())
    assert torch.equal(pattern.leading(4).materialize(), dense[:, :4, :4])
    assert pattern.leading(7) is pattern


def test_it_is_a_value() -> None:
    again = BlockPattern(THREE.row_offsets, THREE.block_indices)
    assert again == THREE
    assert hash(again) == hash(THREE)
    assert local_window(3, window=0) != THREE
    assert THREE != "a pattern"
    assert pickle.loads(pickle.dumps(THREE)) == THREE
    assert copy.deepcopy(THREE) == THREE
    offsets = torch.tensor([0, 1, 2])
    own = BlockPattern(offsets, torch.tensor([0, 1]))
    offsets[1] = 7
    assert own.row(0).tolist() == [0]
    with pytest.raises(AttributeError, match="immutable"):
        THREE.num_blocks = 4
    with pytest.raises(AttributeError, match="immutable"):
        del THREE._row_offsets


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockPattern.from_rows([[0], []]), "row 1 of head 0 keeps no block"),
        (lambda: BlockPattern.from_rows([[0], [2]]), "block_indices holds 2"),
        (lambda: BlockPattern.from_rows([[0], [-1]]), "block_indices holds -1"),
        (lambda: BlockPattern.from_rows([[0]], [[0], [1]]), r"heads have \[1, 2\] rows"),
        (lambda: BlockPattern.from_rows(), "one head at least"),
        (lambda: BlockPattern(torch.tensor([0, 1]), torch.tensor([0, 0])), "2 block_indices"),
        (lambda: BlockPattern(torch.tensor([0, 2, 3]), torch.tensor([1, 0, 1])), "ascend"),
        (lambda: BlockPattern(torch.tensor([0, 2, 3]), torch.tensor([1, 1, 1])), "ascend"),
        (lambda: BlockPattern(torch.tensor([0]), torch.tensor([0])), "one block at least"),
        (lambda: BlockPattern.from_mask(torch.ones(2, 3, dtype=torch.bool)), r"shape \(2, 3\)"),
        (lambda: BlockPattern.from_mask(torch.ones(0, 0, dtype=torch.bool)), "one block at least"),
        (lambda: BlockPattern.per_head([]), "one pattern at least"),
        (lambda: THREE | local_window(4, window=1), "3 and 4 blocks"),
        (lambda: THREE & BlockPattern.from_rows([[1], [2], [1]]), "row 0 of head 0 keeps no block"),
        (lambda: BlockPattern.from_rows([[1], [1]]).causal(), "row 0 of head 0 keeps no block"),
        (lambda: THREE.leading(4), "num_blocks is 4 and the pattern has 3"),
        (lambda: BlockPattern.from_rows([[1], [1]]).leading(1), "keeps no block"),
        (lambda: THREE.row(3), "index is 3"),
    ],
)
def test_wrong_lists_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockPattern.from_rows([[0.7]]), r"a row is \[0.7\]; it must list the numbers"),
        (lambda: BlockPattern.from_rows([[True]]), r"a row is \[True\]"),
        (lambda: BlockPattern.from_rows([[[0]]]), r"a row is \[\[0\]\]"),
        (lambda: BlockPattern.per_head([THREE, [0]]), "pattern is a list; it must be a Block"),
        (lambda: from_dilated("longnet", 8, 4, 2), "pattern is a str; it must be a Dilated"),
        (lambda: is_exact_for(THREE, 8, 4), "pattern is a BlockPattern; it must be a Dilated"),
    ],
)
def test_other_types_are_refused(make, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_a_pattern_of_inference_mode_trains() -> None:
    with torch.inference_mode():
        patterns = local_window(3, window=1), THREE | THREE
    for pattern in patterns:
        x = torch.randn(1, 12, 2, 4, requires_grad=True)
        block_sparse_attention(x, x, x, pattern, 4).sum().backward()
        assert x.grad.abs().sum() > 0


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match="row_offsets has dtype"):
        BlockPattern(torch.tensor([0.0, 1.0]), torch.tensor([0]))
    with pytest.raises(TypeError, match="unsupported operand"):
        THREE | 3
