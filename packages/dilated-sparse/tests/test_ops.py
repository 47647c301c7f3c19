"""The operators: their registration, compilers, checkpointing, autocast."""

import pytest
import torch
from dilated_core import DilatedPattern
from dilated_sparse import (
    AdaptiveSparseAttention,
    BlockSparseAttention,
    NSASizes,
    block_sparse_attention,
    dilated_sparse,
    moba_attention,
    native_sparse_attention,
    windowed_dilated_attention,
)
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


KINDS = {
    "pattern": lambda *x: block_sparse_attention(*x, PATTERN, 4, is_causal=True),
    "window": lambda *x: windowed_dilated_attention(*x, DilatedPattern([8], [2]), 4),
    "moba": lambda *x: moba_attention(*x, 4, 3),
}


@pytest.mark.parametrize("attend", KINDS.values(), ids=KINDS)
def test_what_has_no_derivative_is_refused(attend) -> None:
    leaves = tensors()
    # The second term reaches q by itself, so its own second derivative would hide the missing one.
    total = attend(*leaves).square().sum() + leaves[0].pow(3).sum()
    (grad,) = torch.autograd.grad(total, leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives in reverse mode only"):
        torch.autograd.grad(grad.sum(), leaves[:1])
    q, k, v = _detached(leaves)
    with pytest.raises(RuntimeError, match="first derivatives in reverse mode only"):
        torch.func.jvp(lambda x: attend(x, k, v), (q,), (q,))


@pytest.mark.parametrize("attend", KINDS.values(), ids=KINDS)
def test_transforms_of_torch_func(attend) -> None:
    torch.manual_seed(1)
    batch = torch.randn(3, 2, 1, 18, 2, 8).unbind()

    def loss(*x: torch.Tensor) -> torch.Tensor:
        return attend(*x).square().sum()

    mapped = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*batch)
    for i in range(2):
        leaves = [x[i].clone().requires_grad_() for x in batch]
        grads = torch.autograd.grad(loss(*leaves), leaves)
        torch.testing.assert_close(tuple(x[i] for x in mapped), grads)
    # One backward for many gradients at once.
    out = attend(*leaves)
    douts = torch.randn(3, *out.shape)
    many = torch.autograd.grad(out, leaves, douts, is_grads_batched=True, retain_graph=True)
    one = torch.autograd.grad(out, leaves, douts[2])
    torch.testing.assert_close([x[2] for x in many], list(one))


def test_a_choice_under_autocast_is_that_of_half_precision() -> None:
    torch.manual_seed(0)
    tensors = torch.randn(3, 1, 400, 2, 16).unbind()
    sizes = NSASizes(8, 4, 8, num_selected_blocks=4, window_size=16)

    def nsa(*x: torch.Tensor) -> torch.Tensor:
        pooled = [y.unfold(1, 8, 4)[..., 0] for y in x[1:]]
        gates = torch.linspace(0, 1, 2400).view(1, 400, 2, 3)
        return native_sparse_attention(x[0], pooled, x[1:], x[1:], gates, sizes=sizes)

    adaptive = AdaptiveSparseAttention(num_heads=2, head_dim=16, block_size=8, topk=8).eval()
    for attend in (nsa, lambda *x: moba_attention(*x, 8, 4), lambda *x: adaptive(*x, True)):
        with torch.autocast("cpu", torch.bfloat16):
            out = attend(*tensors)
        assert torch.equal(out, attend(*(x.bfloat16() for x in tensors)))
