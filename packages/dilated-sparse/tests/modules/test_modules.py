"""Modules and factories: the function inside, options honoured, factory names of core."""

import numpy as np
import pytest
import torch
from dilated_core import create_dilated_attention, create_multihead_dilated_attention
from dilated_sparse import (
    AdaptiveSparseAttention,
    BlockSparseAttention,
    BlockSparseMultiheadAttention,
    MoBAAttention,
    NativeSparseAttention,
    SparsePatternConfig,
    WindowedDilatedAttention,
    block_sparse_attention,
    create_block_sparse_attention,
    pattern_of_type,
)

KINDS = ["local_window", "dilated_sparse", "global_local", "hierarchical"]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_is_the_function_with_its_pattern(kind, is_causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 90, 4, 8).unbind()
    attention = BlockSparseAttention(pattern_type=kind, sparsity_ratio=0.4, block_size=8, scale=0.2)
    pattern = pattern_of_type(kind, 12, sparsity_ratio=0.4, is_causal=is_causal)
    expected = block_sparse_attention(q, k, v, pattern, 8, is_causal, 0.2)
    assert torch.equal(attention(q, k, v, is_causal), expected)
    mask = torch.rand(2, 90) < 0.2
    mask[:, 0] = mask[:, -1] = False
    expected = block_sparse_attention(q, k, v, pattern, 8, is_causal, 0.2, key_padding_mask=mask)
    assert torch.equal(attention(q, k, v, is_causal, key_padding_mask=mask), expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_and_padded_rows_are_as_alone(kind, is_causal: bool) -> None:
    q, k, v = (torch.randn(180, 4, 8, requires_grad=True) for _ in range(3))
    attention = BlockSparseAttention(pattern_type=kind, sparsity_ratio=0.4, block_size=8)
    spans = [(0, 20), (20, 121), (121, 122), (122, 180)]
    alone = torch.cat(
        [attention(*(x[None, a:b] for x in (q, k, v)), is_causal)[0] for a, b in spans]
    )
    bounds = torch.tensor([0, *(b for _, b in spans)])
    packed = attention(q, k, v, is_causal, cu_seqlens=bounds)
    assert torch.equal(packed, alone)
    # Padded on the left, on the right and on both sides.
    places = [(0, 20), (9, 110), (109, 110), (50, 108)]
    mask = torch.ones(4, 110, dtype=torch.bool)
    index = torch.zeros(4, 110, dtype=torch.int64)
    for row, (place, span) in enumerate(zip(places, spans, strict=True)):
        mask[row, slice(*place)] = False
        index[row, slice(*place)] = torch.arange(*span)
    padded = attention(*(x[index] for x in (q, k, v)), is_causal, key_padding_mask=mask)
    assert torch.equal(padded[~mask], alone)
    assert not padded[mask].any()
    dout = torch.randn(180, 4, 8)
    expected = torch.autograd.grad(alone, (q, k, v), dout)
    for got in (packed, padded[~mask]):
        for a, b in zip(torch.autograd.grad(got, (q, k, v), dout), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_dropout_is_for_training_only() -> None:
    q, k, v = torch.randn(3, 1, 64, 2, 8).unbind()
    attention = BlockSparseAttention(sparsity_ratio=0.5, block_size=8, dropout=0.5)
    plain = BlockSparseAttention(sparsity_ratio=0.5, block_size=8)(q, k, v)
    assert not torch.equal(attention(q, k, v), plain)
    assert torch.equal(attention.eval()(q, k, v), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind) -> None:
    mha = create_block_sparse_attention(
        embed_dim=32, num_heads=4, sparsity_ratio=0.1, pattern_type=kind, num_kv_heads=2
    )
    x = torch.randn(2, 300, 32, requires_grad=True)
    y = mha(x, x, x, is_causal=True)
    assert y.shape == x.shape
    y.square().sum().backward()
    for name, parameter in mha.named_parameters():
        assert parameter.grad is not None, name
        # A bias of k moves all scores of a query alike, which a softmax does not show.
        assert parameter.grad.abs().sum() > 0 or name == "k_proj.bias", name
    assert isinstance(mha.attention, BlockSparseAttention)


def test_with_all_blocks_it_is_dense_attention() -> None:
    dense = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    mha = BlockSparseMultiheadAttention.from_multihead_attention(
        dense, sparsity_ratio=1.0, block_size=16
    )
    x = torch.randn(2, 50, 32)
    torch.testing.assert_close(mha(x, x, x), dense(x, x, x)[0], atol=1e-5, rtol=1e-4)
    mask = torch.zeros(2, 50, dtype=torch.bool)
    mask[0, 30:] = True
    y, none = mha(x, x, x, key_padding_mask=mask, need_weights=False)
    assert none is None
    expected = dense(x, x, x, key_padding_mask=mask)[0]
    torch.testing.assert_close(y[~mask], expected[~mask], atol=1e-5, rtol=1e-4)


def test_factory_names_of_core() -> None:
    attention = create_dilated_attention("block_sparse", sparsity_ratio=0.3, dropout=0.1)
    assert isinstance(attention, BlockSparseAttention)
    assert (attention.config.sparsity_ratio, attention.config.dropout) == (0.3, 0.1)
    mha = create_multihead_dilated_attention(
        "block_sparse", embed_dim=32, num_heads=4, pattern_type="hierarchical"
    )
    assert isinstance(mha, BlockSparseMultiheadAttention)
    assert mha.attention.config.pattern_type == "hierarchical"
    with pytest.raises(ValueError, match=r"segment_lengths is \[64\]; .* no dilated branches"):
        create_dilated_attention("block_sparse", segment_lengths=[64], dilation_rates=[1])


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "sparsity_ratio is 0", {"sparsity_ratio": 0}),
        (ValueError, "at most 1", {"sparsity_ratio": 90}),
        (ValueError, "pattern_type is 'learned'", {"pattern_type": "learned"}),
        (ValueError, "block_size is 0", {"block_size": 0}),
        (ValueError, "dropout is 2", {"dropout": 2}),
        (TypeError, "window", {"window": 3}),
        (TypeError, "is_causal", {"is_causal": True}),
    ],
)
def test_wrong_options_are_refused(error, message: str, options: dict) -> None:
    with pytest.raises(error, match=message):
        BlockSparseAttention(**options)
    with pytest.raises(error, match=message):
        create_block_sparse_attention(32, 4, **options)


def test_numbers_may_be_those_of_numpy() -> None:
    q = k = v = torch.randn(1, 50, 2, 8)
    x = torch.randn(1, 50, 16)
    size, ratio = np.int64(16), np.float32(0.5)
    for attention in (
        BlockSparseAttention(sparsity_ratio=ratio, block_size=size, dropout=np.float64(0.1)),
        AdaptiveSparseAttention(num_heads=2, head_dim=np.int64(8), block_size=size, mass=ratio),
        MoBAAttention(block_size=size, topk=np.int64(2)),
        WindowedDilatedAttention([16], [1], window=size),
    ):
        assert attention(q, k, v, is_causal=True).shape == q.shape
        plain = {int, float, str, bool, tuple, type(None)}
        assert {type(value) for value in vars(attention.config).values()} <= plain
    nsa = NativeSparseAttention(16, 2, selection_block_size=size, compression_block_size=size)
    assert nsa(x, x, x, is_causal=True).shape == x.shape


def test_a_config_gives_the_pattern_of_any_length() -> None:
    config = SparsePatternConfig(pattern_type="local_window", sparsity_ratio=0.2, block_size=10)
    assert config.pattern_for(101).num_blocks == 11
    assert config.pattern_for(101, is_causal=True) == pattern_of_type(
        "local_window", 11, sparsity_ratio=0.2, is_causal=True
    )
    assert config.pattern_for(101) is config.pattern_for(110)
    with pytest.raises(ValueError, match="seq_len is -5"):
        config.pattern_for(-5)
    with pytest.raises(TypeError, match=r"seq_len is 1.5"):
        config.pattern_for(1.5)
