"""Backends that walk lists of blocks get whole sequences: the right lists, tensors and options."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from dilated_core import AttentionOutput, register_backend, unregister_backend
from dilated_core.backends.contract import CONTRACT_VERSION, BlockLists
from dilated_sparse import (
    BlockPattern,
    block_sparse_attention,
    block_sparse_attention_with_lse,
    dilated_sparse,
    global_local,
    local_window,
    random_blocks,
)
from dilated_sparse.execution.whole import block_lists
from oracle import dense_attention, masked_rows, position_mask


class Listed:
    """Dense attention under the mask of the lists, in float64."""

    name, priority, contract = "listed", -1, CONTRACT_VERSION

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def why_not(self, inputs):
        return [] if inputs.block_size == 4 else ["block_size is not 4."]

    def forward(self, *arguments):
        raise AssertionError("a task reached a backend that walks lists")

    backward = forward

    def scores(self, q, k, blocks, options) -> torch.Tensor:
        S, H = q.shape[1:3]
        kept = entries(blocks.row_offsets, blocks.key_blocks)
        # The columns list the same blocks.
        assert torch.equal(entries(blocks.column_offsets, blocks.query_blocks).mT, kept)
        kept = kept.repeat_interleave(H // kept.shape[0], 0)
        seen = kept.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :S, :S]
        if options.is_causal:
            assert not kept.triu(1).any()
            seen = seen.tril()
        seen = seen.unsqueeze(0)
        if options.key_padding_mask is not None:
            seen = seen & ~options.key_padding_mask[:, None, None, :]
        scores = torch.einsum("bihd,bjhd->bhij", q, shared(k, q)) * options.scale
        return scores.masked_fill(~seen, -torch.inf)

    def block_sparse_forward(self, q, k, v, blocks: BlockLists, options) -> AttentionOutput:
        self.lengths.append(q.shape[1])
        scores = self.scores(q, k, blocks, options)
        lse = scores.logsumexp(-1)
        p = (scores - lse.where(lse > -torch.inf, 0).unsqueeze(-1)).exp()
        return AttentionOutput(torch.einsum("bhij,bjhd->bihd", p, shared(v, q)), lse.mT)

    def block_sparse_backward(self, dout, q, k, v, lse, delta, blocks, options):
        p = (self.scores(q, k, blocks, options) - lse.mT.unsqueeze(-1)).exp()
        ds = torch.einsum("bihd,bjhd->bhij", dout, shared(v, q)) - delta.mT.unsqueeze(-1)
        ds = p * ds * options.scale
        dk, dv = (
            torch.einsum("bhij,bihd->bjhd", *x).unflatten(2, (k.shape[2], -1)).sum(3)
            for x in ((ds, q), (p, dout))
        )
        return torch.einsum("bhij,bjhd->bihd", ds, shared(k, q)), dk, dv


def entries(offsets: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """`(P, N, N)` bool, True for the listed blocks."""
    assert (offsets.dtype, blocks.dtype) == (torch.int64, torch.int32)
    dense = torch.zeros(offsets.shape[0], offsets.shape[1] - 1, offsets.shape[1] - 1)
    for p, head in enumerate(offsets.tolist()):
        for i, (a, b) in enumerate(pairwise(head)):
            assert (blocks[a:b].diff() > 0).all()
            dense[p, i, blocks[a:b].long()] += 1
    assert dense.max() == 1
    return dense.bool()


def shared(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(q.shape[2] // x.shape[2], 2)


@pytest.fixture
def listed() -> Iterator[Listed]:
    backend = Listed()
    register_backend(backend)
    yield backend
    unregister_backend("listed")


def leaves(*shape: int, kv_heads: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (shape, *[(*shape[:-2], kv_heads, shape[-1])] * 2)
    return [torch.randn(x, dtype=torch.float64, requires_grad=True) for x in shapes]


def compare(got, exact, tensors) -> None:
    """Out, lse and the gradients through both."""
    sees = exact[1] > -torch.inf
    assert torch.equal(got[1] > -torch.inf, sees)
    torch.testing.assert_close(got[0], exact[0])
    torch.testing.assert_close(got[1], exact[1])
    dout, dlse = torch.randn_like(exact[0]), torch.randn_like(exact[1]) * sees
    grads = torch.autograd.grad(got, tensors, (dout, dlse))
    want = torch.autograd.grad((exact[0], exact[1].where(sees, 0)), tensors, (dout, dlse))
    for a, b in zip(grads, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "pattern",
    [
        dilated_sparse(6, sparsity_ratio=0.4),
        random_blocks(6, num_random=2, seed=3, num_heads=4),
        BlockPattern.per_head([local_window(6, window=1), global_local(6, window=0, num_global=1)]),
        BlockPattern.from_rows([[0], [0], [1], [0], [0], [2]]),  # columns without a block
    ],
)
def test_whole_sequences_equal_the_oracle(listed: Listed, pattern, is_causal: bool) -> None:
    tensors = leaves(2, 22, 4, 8, kv_heads=2)
    visible = position_mask(pattern, 22, 4, 4, is_causal=is_causal).expand(2, 4, 22, 22)
    got = block_sparse_attention_with_lse(*tensors, pattern, 4, is_causal, backend="listed")
    compare(got, dense_attention(*tensors, visible), tensors)
    assert listed.lengths == [22]


@pytest.mark.parametrize("is_causal", [False, True])
def test_masks_and_documents_are_sequences_of_their_own(listed: Listed, is_causal: bool) -> None:
    pattern = global_local(6, window=1, num_global=1)
    mask = torch.zeros(3, 22, dtype=torch.bool)
    mask[0, :9] = mask[2, 5:7] = True
    tensors = leaves(3, 22, 4, 8, kv_heads=2)
    got = block_sparse_attention_with_lse(
        *tensors, pattern, 4, is_causal, key_padding_mask=mask, backend="listed"
    )
    visible = masked_rows(pattern, mask, 4, 4, is_causal=is_causal)
    compare(got, dense_attention(*tensors, visible), tensors)
    assert sorted(listed.lengths) == [13, 22]
    bounds = torch.tensor([0, 5, 5, 22])
    tensors = leaves(22, 4, 8, kv_heads=2)
    got = block_sparse_attention_with_lse(
        *tensors, pattern, 4, is_causal, cu_seqlens=bounds, backend="listed"
    )
    exact = block_sparse_attention_with_lse(
        *tensors, pattern, 4, is_causal, cu_seqlens=bounds, backend="eager"
    )
    compare(got, exact, tensors)
    assert listed.lengths[2:] == [5, 17]


def test_lists_are_made_once_for_a_pattern(listed: Listed) -> None:
    tensors = leaves(1, 22, 2, 8, kv_heads=2)
    before = block_lists.cache_info().misses
    for _ in range(3):
        pattern = random_blocks(6, num_random=1, seed=11)
        block_sparse_attention(*tensors, pattern, 4, backend="listed").sum().backward()
    assert block_lists.cache_info().misses == before + 1


def test_what_the_backend_refuses_is_refused(listed: Listed) -> None:
    tensors = leaves(1, 22, 2, 8, kv_heads=2)
    with pytest.raises(ValueError, match="block_size is not 4"):
        block_sparse_attention(*tensors, local_window(3, window=1), 8, backend="listed")
