"""MoBA and NSA as modules: the function inside, gradients, masks, names, compilation."""

import pytest
import torch
from dilated_core import create_dilated_attention, create_multihead_dilated_attention
from dilated_core.positions.rotary import rotate, rotation_at
from dilated_sparse import (
    AdaptiveSparseMultiheadAttention,
    MoBAAttention,
    MoBAMultiheadAttention,
    NativeSparseAttention,
    create_adaptive_sparse_attention,
    moba_attention,
    native_sparse_attention,
)
from torch._dynamo.testing import CompileCounter

SMALL = {
    "compression_block_size": 8,
    "compression_stride": 4,
    "selection_block_size": 8,
    "num_selected_blocks": 4,
    "window_size": 12,
}


def nsa(mix: str = "gate", **options) -> NativeSparseAttention:
    return NativeSparseAttention(32, 4, num_kv_heads=2, mix=mix, **(SMALL | options))


def test_moba_is_the_function_with_its_options() -> None:
    q, k, v = torch.randn(3, 2, 90, 4, 8).unbind()
    attention = MoBAAttention(block_size=8, topk=3, scale=0.2)
    expected = moba_attention(q, k, v, 8, 3, 0.2)
    assert torch.equal(attention(q, k, v, is_causal=True), expected)
    assert repr(attention) == "MoBAAttention(block_size=8, topk=3, scale=0.2)"
    with pytest.raises(ValueError, match="causal attention only"):
        attention(q, k, v)


@pytest.mark.parametrize("S", [1, 5, 100])
@pytest.mark.parametrize("mix", ["gate", "lse"])
def test_every_parameter_of_nsa_gets_a_gradient(mix: str, S: int) -> None:
    module = nsa(mix)
    x = torch.randn(2, S, 32, requires_grad=True)
    y = module(x, x, x, is_causal=True)
    (y * torch.randn(32, S, 2).permute(2, 1, 0)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        # A sequence shorter than a block has no compressed keys; one key has no scores to learn.
        # A bias of keys moves all scores of a branch alike, which its softmax does not show.
        is_bias = name == "k_proj.bias" or name == "compress_k.down.bias"
        if S == 100 and not (is_bias and mix == "gate"):
            assert parameter.grad.abs().sum() > 0, name


def test_every_parameter_of_moba_gets_a_gradient() -> None:
    module = MoBAMultiheadAttention(32, 4, num_kv_heads=2, block_size=8, topk=3)
    x = torch.randn(2, 100, 32)
    module(x, x, x, is_causal=True).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or name == "k_proj.bias", name


@pytest.mark.parametrize("build", [
    nsa,
    lambda: nsa("lse"),
    lambda: MoBAMultiheadAttention(32, 4, block_size=8, topk=3),
])  # fmt: skip
def test_the_future_never_leaks_and_a_prefix_ends_alike(build) -> None:
    module = build().double()
    x = torch.randn(1, 70, 32, dtype=torch.float64)
    before = module(x, x, x, is_causal=True)
    for t in (0, 7, 8, 33, 69):
        later = torch.cat([x[:, :t], torch.randn_like(x[:, t:]) * 5], 1)
        after = module(later, later, later, is_causal=True)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-9, atol=1e-11)
        prefix = x[:, : t + 1]
        last = module(prefix, prefix, prefix, is_causal=True)[:, -1]
        torch.testing.assert_close(last, before[:, t], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mix", ["gate", "lse"])
def test_documents_and_padded_rows_of_nsa_are_as_alone(mix: str) -> None:
    module = nsa(mix, layer_norm=False).double()
    x = torch.randn(70, 32, dtype=torch.float64)
    spans = [(0, 9), (9, 10), (10, 47), (47, 70)]
    alone = torch.cat([module(*[x[None, a:b]] * 3, is_causal=True)[0] for a, b in spans])
    bounds = torch.tensor([0, 9, 10, 47, 70])
    torch.testing.assert_close(module(x, x, x, is_causal=True, cu_seqlens=bounds), alone)
    places = [(0, 9), (39, 40), (3, 40), (10, 33)]
    mask = torch.ones(4, 40, dtype=torch.bool)
    index = torch.zeros(4, 40, dtype=torch.int64)
    for row, (place, span) in enumerate(zip(places, spans, strict=True)):
        mask[row, slice(*place)] = False
        index[row, slice(*place)] = torch.arange(*span)
    padded = module(*[x[index]] * 3, is_causal=True, key_padding_mask=mask)
    torch.testing.assert_close(padded[~mask], alone)
    hole = torch.arange(40).expand(4, 40) == 7
    with pytest.raises(ValueError, match="between visible ones"):
        module(*[x[index]] * 3, is_causal=True, key_padding_mask=hole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    for module in (nsa(), MoBAMultiheadAttention(32, 4, block_size=8, topk=3)):
        low = module.to(dtype)
        x = torch.randn(1, 60, 32, dtype=dtype)
        y = low(x, x, x, is_causal=True)
        assert y.dtype == dtype
        y.float().sum().backward()
        assert all(p.grad.isfinite().all() for p in low.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        module, x = nsa(), torch.randn(1, 60, 32)
        assert module(x, x, x, is_causal=True).dtype == torch.bfloat16


@pytest.mark.parametrize("scale_base", [None, 64.0])
def test_a_rotation_makes_scores_depend_on_distances(scale_base) -> None:
    """Positions that all begin later change nothing; other distances do; documents are as alone."""
    module, x = nsa().double(), torch.randn(2, 60, 32, dtype=torch.float64)

    def turned(first: int, step: int = 1) -> torch.Tensor:
        positions = torch.arange(60) * step + first
        factors = rotation_at(
            positions, 8, scale_base=scale_base, center=first, dtype=torch.float64
        )
        return module(x, x, x, is_causal=True, rotation=factors)

    torch.testing.assert_close(turned(0), turned(37))
    assert (turned(0) - turned(0, 2)).abs().max() > 1e-4
    assert (turned(0) - module(x, x, x, is_causal=True)).abs().max() > 1e-4
    # A compressed key is turned by the middle of its block: positions 4, 8, 12, … of blocks of 8.
    factors = rotation_at(torch.arange(60), 8, scale_base=scale_base, dtype=torch.float64)
    q, *kv = (p(x).unflatten(-1, (-1, 8)) for p in (module.q_proj, module.k_proj, module.v_proj))
    keys, values = (part.chunk(3, dim=2) for part in kv)
    k_factors = (factors.k_cos, factors.k_sin)
    out = native_sparse_attention(
        rotate(q, factors.q_cos, factors.q_sin),
        (
            rotate(module.compress_k(keys[0]), *(f[4:57:4] for f in k_factors)),
            module.compress_v(values[0]),
        ),
        *((rotate(k, *k_factors), v) for k, v in zip(keys[1:], values[1:], strict=True)),
        module.gate(x).unflatten(-1, (-1, 3)),
        sizes=module.attention_config.sizes,
    )
    torch.testing.assert_close(module.out_proj(module.layer_norm(out.flatten(-2))), turned(0))
    cu_seqlens, positions = (
        torch.tensor([0, 25, 60]),
        torch.cat([torch.arange(25), torch.arange(35)]),
    )
    packed = module(
        *([x[0]] * 3),
        is_causal=True,
        cu_seqlens=cu_seqlens,
        rotation=rotation_at(positions, 8, scale_base=scale_base, dtype=torch.float64),
    )
    alone = [x[:1, a:b] for a, b in ((0, 25), (25, 60))]
    for got, part in zip(packed.split([25, 35]), alone, strict=True):
        factors = rotation_at(
            torch.arange(part.shape[1]), 8, scale_base=scale_base, dtype=torch.float64
        )
        expected = module(part, part, part, is_causal=True, rotation=factors)
        torch.testing.assert_close(got, expected[0])
    with pytest.raises(ValueError, match="there are 60 positions"):
        module(x, x, x, is_causal=True, rotation=rotation_at(torch.arange(59), 8))


def test_all_methods_of_choosing_by_content_have_one_factory() -> None:
    classes = {
        "learned": AdaptiveSparseMultiheadAttention,
        "moba": MoBAMultiheadAttention,
        "nsa": NativeSparseAttention,
    }
    x = torch.randn(1, 70, 32)
    for method, cls in classes.items():
        torch.manual_seed(0)
        mha = create_adaptive_sparse_attention(32, 4, method=method, num_kv_heads=2)
        torch.manual_seed(0)
        named = cls(32, 4, num_kv_heads=2)
        assert torch.equal(mha(x, x, x, is_causal=True), named(x, x, x, is_causal=True))
        assert type(mha) is cls
    assert type(create_adaptive_sparse_attention(32, 4)) is classes["learned"]
    with pytest.raises(
        ValueError, match="method is 'mob'; it must be one of 'learned', 'moba', 'nsa'"
    ):
        create_adaptive_sparse_attention(32, 4, method="mob")
    with pytest.raises(TypeError, match="sparsity_ratio"):
        create_adaptive_sparse_attention(32, 4, method="moba", sparsity_ratio=0.1)


def test_names_of_the_factories() -> None:
    attention = create_dilated_attention("moba", block_size=8, topk=2)
    assert isinstance(attention, MoBAAttention)
    assert attention.config.topk == 2
    mha = create_multihead_dilated_attention("moba", embed_dim=32, num_heads=4, topk=2)
    assert isinstance(mha, MoBAMultiheadAttention)
    module = create_multihead_dilated_attention("nsa", embed_dim=32, num_heads=4, mix="lse")
    assert isinstance(module, NativeSparseAttention)
    assert module.gate is None
    with pytest.raises(ValueError, match="no module on q, k and v"):
        create_dilated_attention("nsa")
    with pytest.raises(ValueError, match="segment_lengths is"):
        create_dilated_attention("moba", segment_lengths=[8], dilation_rates=[1])


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "mix is 'sum'", {"mix": "sum"}),
        (ValueError, "the stride must divide it", {"compression_stride": 5}),
        (TypeError, "topk", {"topk": 3}),
    ],
)
def test_wrong_options_are_refused(error, message: str, options: dict) -> None:
    with pytest.raises(error, match=message):
        NativeSparseAttention(32, 4, **options)


def test_modules_compile_to_one_graph_for_all_lengths() -> None:
    counter = CompileCounter()
    for module in (MoBAMultiheadAttention(32, 4, block_size=8, topk=3), nsa()):
        torch._dynamo.reset()
        counter.clear()
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
        for S in (70, 81, 50):
            x = torch.randn(1, S, 32)
            got, expected = (f(x, x, x, is_causal=True) for f in (compiled, module))
            torch.testing.assert_close(got, expected)
            got.sum().backward()
        assert counter.frame_count == 1
