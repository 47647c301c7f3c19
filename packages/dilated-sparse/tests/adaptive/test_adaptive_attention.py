"""The module: an exact softmax over its selection, no future, documents, padding, gradients."""

import pytest
import torch
from dilated_core import create_dilated_attention, create_multihead_dilated_attention
from dilated_core.testing.dropout import kept_pairs
from dilated_core.testing.error_budget import assert_within_budget, relative_error
from dilated_sparse import (
    AdaptiveSparseAttention,
    AdaptiveSparseConfig,
    AdaptiveSparseMultiheadAttention,
    BlockSelection,
    create_adaptive_sparse_attention,
)
from dilated_sparse.adaptive.ops import attend_selected
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import dense_attention


def trained(**options) -> AdaptiveSparseAttention:
    """A module whose gate is not 0."""
    attention = AdaptiveSparseAttention(num_heads=4, head_dim=8, num_kv_heads=2, **options)
    torch.manual_seed(7)
    for weight in attention.gate.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return attention.eval()


def tensors(S: int, B: int = 2, dtype=torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(S)
    return [torch.randn(B, S, heads, 8, dtype=dtype).requires_grad_() for heads in (4, 2, 2)]


def visible(selection: BlockSelection, S: int, size: int, *, is_causal: bool) -> torch.Tensor:
    mask = selection.materialize().repeat_interleave(2, 1)
    mask = mask.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :S, :S]
    return mask.tril() if is_causal else mask


def check(out, expected, leaves) -> None:
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
    dout = torch.randn(*out.shape[::-1], dtype=out.dtype).permute(*range(out.dim())[::-1])
    grads = [torch.autograd.grad(x, leaves, dout, retain_graph=True) for x in (out, expected)]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


@given(
    st.integers(1, 40),
    st.sampled_from([4, 5, 16]),
    st.booleans(),
    st.sampled_from([{"topk": 2}, {"mass": 0.6}, {"sparsity_ratio": 0.4}, {"sparsity_ratio": 1.0}]),
    st.booleans(),
)
@settings(deadline=None, max_examples=20)
def test_exact_softmax_over_the_selection(
    S: int, size: int, is_causal: bool, budget: dict, lookahead: bool
) -> None:
    q, k, v = leaves = tensors(S)
    attention = trained(block_size=size, lookahead=lookahead, sink_blocks=0, scale=0.7, **budget)
    selection = attention.select(q, k, is_causal)
    mask = visible(selection, S, size, is_causal=is_causal)
    if budget == {"sparsity_ratio": 1.0}:
        full = torch.ones(S, S, dtype=torch.bool)
        assert torch.equal(mask, (full.tril() if is_causal else full).expand(mask.shape))
    check(attention(q, k, v, is_causal), dense_attention(*leaves, mask, scale=0.7)[0], leaves)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("S", [23, 24])
def test_any_selection_mask_and_gradient_of_the_lse(S: int, is_causal: bool) -> None:
    leaves = tensors(S)
    N = -(-S // 4)
    blocks = (torch.rand(2, 2, N, N) < 0.4) | torch.eye(N, dtype=torch.bool)
    selection = BlockSelection.from_mask(blocks.tril() if is_causal else blocks)
    hidden = torch.rand(2, S) < 0.3
    out, lse = attend_selected(
        *leaves, selection, block_size=4, is_causal=is_causal, scale=0.4, key_padding_mask=hidden
    )
    mask = visible(selection, S, 4, is_causal=is_causal) & ~hidden[:, None, None]
    expected, expected_lse = dense_attention(*leaves, mask, scale=0.4)
    empty = lse == -torch.inf
    torch.testing.assert_close(lse, expected_lse)
    check(
        torch.cat([out, lse.masked_fill(empty, 0)[..., None]], -1),
        torch.cat([expected, expected_lse.masked_fill(empty, 0)[..., None]], -1),
        leaves,
    )


@pytest.mark.parametrize(
    ("budget", "gate_gradient"),
    [({"topk": 3}, None), ({"mass": 0.5}, None), ({"sparsity_ratio": 0.4}, "bias")],
)
def test_no_output_depends_on_a_later_position(budget: dict, gate_gradient) -> None:
    S = 22
    q, k, v = (x.detach() for x in tensors(S, B=1))
    attention = trained(
        block_size=4, sub_block_size=2, sink_blocks=0, local_blocks=0,
        gate_gradient=gate_gradient, **budget,
    )  # fmt: skip
    before = attention(q, k, v, is_causal=True)
    kept = attention.select(q, k, is_causal=True).materialize()
    has_changed = False
    for t in range(S):
        later = [torch.cat([x[:, :t], x[:, t:].flip(1) * 1e4], 1) for x in (q, k, v)]
        after = attention(*later, is_causal=True)
        # Rows of blocks are grouped by what they keep, and the last bit depends on the group.
        torch.testing.assert_close(before[:, :t], after[:, :t], rtol=1e-13, atol=1e-14)
        changed = attention.select(*later[:2], is_causal=True).materialize()
        rows = -(-t // 4)  # the rows of blocks that begin before position t
        assert torch.equal(kept[:, :, :rows], changed[:, :, :rows])
        has_changed |= not torch.equal(kept, changed)
    assert has_changed


def test_lookahead_reads_later_queries_of_the_own_block_and_no_later_key() -> None:
    S = 22
    q, k, v = (x.detach() for x in tensors(S, B=1))
    attention = trained(
        block_size=4, sub_block_size=2, topk=3, local_blocks=0, sink_blocks=0, lookahead=True
    )
    before = attention(q, k, v, is_causal=True)
    reads_ahead = False
    for t in range(S):
        changed = [torch.cat([x[:, :t], x[:, t:].flip(1) * -5], 1) for x in (q, k, v)]
        after = attention(q, *changed[1:], is_causal=True)
        torch.testing.assert_close(before[:, :t], after[:, :t], rtol=1e-13, atol=1e-14)
        after = attention(*changed, is_causal=True)
        block = t // 4 * 4
        torch.testing.assert_close(before[:, :block], after[:, :block], rtol=1e-13, atol=1e-14)
        reads_ahead |= not torch.allclose(before[:, :t], after[:, :t])
    assert reads_ahead


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("budget", "gate_gradient"),
    [({"topk": 3}, "bias"), ({"mass": 0.5}, None), ({"sparsity_ratio": 0.4}, None)],
)
def test_padding_and_documents_give_what_the_sequence_gives_alone(
    budget: dict, is_causal: bool, gate_gradient
) -> None:
    attention = trained(block_size=4, sub_block_size=2, gate_gradient=gate_gradient, **budget)
    q, k, v = (x.detach() for x in tensors(21, B=1))
    alone = attention(q, k, v, is_causal)
    bounds = {"before": (9, 0), "behind": (0, 6), "both": (5, 7)}
    for before, behind in bounds.values():
        rows = [
            torch.nn.functional.pad(x, (0, 0, 0, 0, before, behind), value=9.0) for x in (q, k, v)
        ]
        hidden = torch.ones(1, 21 + before + behind, dtype=torch.bool)
        hidden[:, before : before + 21] = False
        out = attention(*rows, is_causal, key_padding_mask=hidden)
        torch.testing.assert_close(out[:, before : before + 21], alone)
        assert (out[hidden] == 0).all()
    short = attention(*(x[:, :10] for x in (q, k, v)), is_causal)
    packed = [torch.cat([x[0], x[0, :10]]) for x in (q, k, v)]
    out = attention(*packed, is_causal, cu_seqlens=torch.tensor([0, 21, 21, 31]))
    torch.testing.assert_close(out, torch.cat([alone[0], short[0]]))


def test_all_padding_and_no_position() -> None:
    attention = trained(block_size=4).train()
    q, k, v = leaves = tensors(9)
    hidden = torch.ones(2, 9, dtype=torch.bool)
    out = attention(q, k, v, key_padding_mask=hidden)
    assert (out == 0).all()
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert (grad == 0).all()
    empty = [x[:, :0] for x in (q, k, v)]
    assert attention(*empty).shape == (2, 0, 4, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_within_the_error_budget(dtype: torch.dtype) -> None:
    S = 200
    leaves = tensors(S, dtype=dtype)
    attention = trained(block_size=16, sparsity_ratio=0.4)
    mask = visible(attention.select(*leaves[:2], is_causal=True), S, 16, is_causal=True)
    dout = torch.randn(2, S, 4, 8).to(dtype)
    out = attention(*leaves, is_causal=True)
    actual = [out, *torch.autograd.grad(out, leaves, dout)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = dense_attention(*wide, mask)[0]
    exact = [expected, *torch.autograd.grad(expected, wide, dout.double())]
    low = [x.transpose(1, 2) for x in leaves]
    bias = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)
    dense = torch.nn.functional.scaled_dot_product_attention(*low, attn_mask=bias, enable_gqa=True)
    dense = dense.transpose(1, 2)
    plain = [dense, *torch.autograd.grad(dense, leaves, dout)]
    budget = [relative_error(a, b) for a, b in zip(plain, exact, strict=True)]
    assert_within_budget(actual, exact, budget)


def rotate(x: torch.Tensor) -> torch.Tensor:
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None, None] * 0.5
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


def test_the_gate_reads_what_is_not_rotated() -> None:
    q, k, v = (x.detach() for x in tensors(40))
    attention = trained(block_size=4, topk=5)
    turned = rotate(q), rotate(k)
    own = attention.select(*turned, is_causal=True).materialize()
    given = attention.select(*turned, is_causal=True, unrotated=(q, k))
    assert not torch.equal(own, given.materialize())
    mask = visible(given, 40, 4, is_causal=True)
    out = attention(*turned, v, is_causal=True, unrotated=(q, k))
    torch.testing.assert_close(out, dense_attention(*turned, v, mask)[0])
    # Before training the gate reads them, and changes nothing.
    attention.gate.reset_parameters()
    estimate = attention.select(*turned, is_causal=True, unrotated=(q, k))
    assert torch.equal(estimate.counts, attention.select(*turned, is_causal=True).counts)
    assert torch.equal(
        estimate.block_indices, attention.select(*turned, is_causal=True).block_indices
    )


@pytest.mark.parametrize("options", [{}, {"topk": 4}, {"mass": 0.4}, {"gate_gradient": "bias"}])
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_parameter_learns_from_the_first_step(options: dict, is_causal: bool) -> None:
    torch.manual_seed(0)
    mha = create_adaptive_sparse_attention(
        embed_dim=32, num_heads=4, num_kv_heads=2, block_size=8, **options
    )
    x = torch.randn(2, 130, 32, requires_grad=True)
    y = mha(x, x, x, is_causal=is_causal)
    assert y.shape == x.shape
    y.square().sum().backward()
    for name, parameter in mha.named_parameters():
        assert parameter.grad is not None, name
        # A bias of k moves all scores of a query alike, which a softmax does not show.
        assert parameter.grad.abs().sum() > 0 or name == "k_proj.bias", name
    gate = mha.attention.gate
    for weight in (gate.query_weight, gate.key_weight):
        assert (weight.grad.flatten(2).abs().sum(-1) > 0).all()  # both forms of each head
    for weight in (gate.distance_bias, gate.distance_weight, gate.sharpness):
        assert (weight.grad.flatten(1) if weight.dim() > 1 else weight.grad).abs().sum(-1).all()


def test_with_all_blocks_it_is_dense_attention() -> None:
    dense = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    mha = AdaptiveSparseMultiheadAttention.from_multihead_attention(
        dense, sparsity_ratio=1.0, block_size=16
    )
    x = torch.randn(2, 50, 32)
    torch.testing.assert_close(mha(x, x, x), dense(x, x, x)[0], atol=1e-5, rtol=1e-4)


def test_factory_names_of_core() -> None:
    attention = create_dilated_attention("block_sparse_adaptive", num_heads=4, head_dim=8, topk=3)
    assert isinstance(attention, AdaptiveSparseAttention)
    assert attention.config == AdaptiveSparseConfig(topk=3)
    mha = create_multihead_dilated_attention(
        "block_sparse_adaptive", embed_dim=32, num_heads=4, mass=0.9
    )
    assert isinstance(mha, AdaptiveSparseMultiheadAttention)
    assert repr(mha.attention).startswith(
        "AdaptiveSparseAttention(\n  num_heads=4, head_dim=8, mass"
    )
    with pytest.raises(ValueError, match=r"segment_lengths is \[64\]; .* a budget of blocks"):
        create_dilated_attention(
            "block_sparse_adaptive",
            segment_lengths=[64],
            dilation_rates=[1],
            num_heads=4,
            head_dim=8,
        )


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "topk=3 and mass=0.5 are given", {"topk": 3, "mass": 0.5}),
        (ValueError, "topk is 0", {"topk": 0}),
        (ValueError, "mass is 1.5", {"mass": 1.5}),
        (ValueError, "at most 1", {"sparsity_ratio": 10}),
        (ValueError, "sub_block_size is 6", {"sub_block_size": 6}),
        (ValueError, "local_blocks is -1", {"local_blocks": -1}),
        (ValueError, "distillation is 'some'", {"distillation": "some"}),
        (ValueError, "gate_gradient is 'straight'", {"gate_gradient": "straight"}),
        (TypeError, "lookahead is 1", {"lookahead": 1}),
        (TypeError, "pattern_type.* the content decides", {"pattern_type": "local_window"}),
        (TypeError, "unrotated.* is passed to forward", {"unrotated": 3}),
    ],
)
def test_wrong_options_are_refused(error, message: str, options: dict) -> None:
    with pytest.raises(error, match=message):
        AdaptiveSparseAttention(num_heads=4, head_dim=8, **options)
    with pytest.raises(error, match=message):
        create_adaptive_sparse_attention(32, 4, **options)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "the module is for 4 and 2, of 8", {"q": torch.randn(1, 20, 2, 8)}),
        (TypeError, "unrotated is a Tensor", {"unrotated": torch.randn(2)}),
        (ValueError, "k of unrotated has shape", {"unrotated": (torch.randn(1, 20, 4, 8),) * 2}),
        (TypeError, "is_causal is 1", {"is_causal": 1}),
    ],
)
def test_wrong_arguments_are_refused(error, message: str, change: dict) -> None:
    k = torch.randn(1, 20, 2, 8)
    arguments = {"q": torch.randn(1, 20, 4, 8), "k": k, "v": k} | change
    with pytest.raises(error, match=message):
        trained(block_size=4)(**arguments)


def test_dropout_drops_by_positions_in_training_only() -> None:
    q, k, v = leaves = tensors(40)
    attention = trained(block_size=8, dropout=0.4, topk=4, distillation="none")
    plain = attention(q, k, v, is_causal=True)
    attention.train()
    torch.manual_seed(3)
    out = attention(q, k, v, is_causal=True)
    torch.manual_seed(3)
    kept = kept_pairs(int(torch.randint(2**62, ())), (2, 40, 4), dropout_p=0.4)
    mask = visible(attention.select(q, k, is_causal=True), 40, 8, is_causal=True)
    expected, _ = dense_attention(*leaves, mask, factors=kept.double() / 0.6)
    check(out, expected, leaves)
    assert not torch.equal(plain, out)


@pytest.mark.slow
def test_one_graph_serves_several_lengths() -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: object):
        nonlocal graphs
        graphs += 1
        return graph.forward

    def attend(q, k, v, selection):
        return attend_selected(q, k, v, selection, block_size=4, is_causal=True, scale=0.3).out

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=count)
    attention = trained(block_size=4, topk=3)
    for S in (20, 24, 30):
        leaves = tensors(S, dtype=torch.float32)
        selection = attention.select(*leaves[:2], is_causal=True)
        out = compiled(*leaves, selection)
        expected = attend(*leaves, selection)
        torch.testing.assert_close(out, expected)
        grads = [torch.autograd.grad(x.square().sum(), leaves) for x in (out, expected)]
        torch.testing.assert_close(*grads)
    assert graphs == 1
