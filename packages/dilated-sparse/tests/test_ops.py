"""The operators: their registration, compilers, checkpointing, autocast."""

import pytest
import torch
from dilated_sparse import BlockSparseAttention, block_sparse_attention, dilated_sparse
from dilated_sparse.operators import choice_for
from dilated_sparse.ops import BLOCK_SPARSE
from dilated_sparse.pattern.rule import PatternRule
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

PATTERN = dilated_sparse(5, sparsity_ratio=0.5)


def tensors(S: int = 20) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, S, 2, 8, requires_grad=True) for _ in range(3)]


# opcheck reads .grad of the tensors it compares, leaves or not.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operators_are_registered_rightly() -> None:
    lists = (PATTERN.row_offsets, PATTERN.block_indices)
    rule = PatternRule.of("dilated_sparse", 0.5, is_causal=True).text
    q, k, v = tensors()
    choice = choice_for("sdpa", q, k, has_dropout=False, has_mask=False)
    for pattern in ((*lists, None), (None, None, rule)):
        options = repr((4, True, choice, pattern[2]))
        arguments = (*pattern[:2], 0.3, 0.0, options, None, None, None)
        torch.library.opcheck(BLOCK_SPARSE.forward, (q, k, v, *arguments))
        with torch.no_grad():
            out, lse = BLOCK_SPARSE.forward(q, k, v, *arguments)
            for dlse in (None, torch.randn_like(lse)):
                backward = (torch.randn_like(out), dlse, q, k, v, out, lse, *arguments)
                torch.library.opcheck(BLOCK_SPARSE.backward, tuple(_detached(backward)))


def _detached(values: tuple) -> list:
    return [x.detach() if isinstance(x, torch.Tensor) else x for x in values]


def test_one_graph_serves_several_lengths() -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: object):
        nonlocal graphs
        graphs += 1
        return graph.forward

    def attend(q, k, v, pattern):
        return block_sparse_attention(q, k, v, pattern, 4, is_causal=True)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=count)
    for S in (20, 24, 30):
        pattern = dilated_sparse(-(-S // 4), sparsity_ratio=0.5)
        q, k, v = leaves = tensors(S)
        out = compiled(q, k, v, pattern)
        expected = attend(q, k, v, pattern)
        torch.testing.assert_close(out, expected)
        grads = [torch.autograd.grad(x.square().sum(), leaves) for x in (out, expected)]
        torch.testing.assert_close(*grads)
    assert graphs == 1


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_of_a_module_serves_all_lengths_and_masks(dynamic: bool | None) -> None:
    counter = CompileCounter()
    attention = BlockSparseAttention(sparsity_ratio=0.4, block_size=4)
    compiled = torch.compile(attention, fullgraph=True, dynamic=dynamic, backend=counter)

    def check(S: int, **options) -> None:
        leaves = [torch.randn(2, S, 2, 8, requires_grad=True) for _ in range(3)]
        results = [f(*leaves, is_causal=True, **options) for f in (compiled, attention)]
        assert torch.equal(*results)
        grads = [torch.autograd.grad(x.square().sum(), leaves) for x in results]
        torch.testing.assert_close(*grads)

    # The first graph is for one length, and the second for all, unless lengths are symbolic.
    for_all = 1 if dynamic else 2
    for S in (20, 31, 2, 5, 64, 23):
        check(S)
    assert counter.frame_count == for_all
    for S in (23, 40, 3):
        for share in (0.1, 0.9):
            check(S, key_padding_mask=torch.rand(2, S) < share)
    assert counter.frame_count == 2 * for_all  # calls with a mask have graphs of their own


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_checkpointing_computes_the_same(dropout_p: float) -> None:
    leaves = tensors()

    def attend(*x: torch.Tensor) -> torch.Tensor:
        return block_sparse_attention(*x, PATTERN, 4, dropout_p=dropout_p)

    torch.manual_seed(1)
    plain = attend(*leaves)
    torch.manual_seed(1)
    saved = checkpoint(attend, *leaves, use_reentrant=False)
    assert torch.equal(plain, saved)
    grads = [torch.autograd.grad(x.square().sum(), leaves) for x in (plain, saved)]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_autocast_casts_as_pytorch_does() -> None:
    leaves = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        out = block_sparse_attention(*leaves, PATTERN, 4)
    assert out.dtype == torch.bfloat16
    half = [x.bfloat16() for x in leaves]
    assert torch.equal(out, block_sparse_attention(*half, PATTERN, 4))


def test_a_second_derivative_is_refused() -> None:
    leaves = tensors()
    out = block_sparse_attention(*leaves, PATTERN, 4)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), leaves[:1])
