"""The public functions: properties of the result, and how PyTorch's machinery treats them.

Equality with the oracle over shapes and patterns is in test_conformance.py.
"""

import pytest
import torch
from dilated_core import (
    DilatedPattern,
    dilated_attention,
    dilated_attention_with_lse,
    ops,
    reference_dilated_attention,
)
from dilated_core.testing import AWKWARD_CASES, relative_error
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

PATTERN = DilatedPattern([8, 24, 40], [1, 3, 4], padding="attended")


def _tensors(*shape, dtype=torch.float64):
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for _ in range(3)]


def test_paper_pattern_in_small_matches_the_oracle():
    """The base configuration of the paper at 1/16 of its lengths, whose r = 6, 12 divide no w."""
    pattern = DilatedPattern([128, 256, 512, 1024, 2048], [1, 2, 4, 6, 12])
    q, k, v = _tensors(1, 1100, 12, 8)
    out = dilated_attention(q, k, v, pattern, is_causal=True)
    exact = reference_dilated_attention(q, k, v, pattern, is_causal=True)
    assert relative_error(out, exact) < 1e-13
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), dout)
    want = torch.autograd.grad(exact, (q, k, v), dout)
    assert all(relative_error(a, e) < 1e-12 for a, e in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "case",
    [case for case in AWKWARD_CASES if case.masked is None and not case.documents],
    ids=lambda case: case.name,
)
def test_ones_in_ones_out(case):
    """Averages of ones are ones, where a query sees a key and no zero key dilutes it."""
    q, k, v, _ = case.tensors(dtype=torch.float32)
    pattern = DilatedPattern(
        case.pattern.segment_lengths,
        case.pattern.dilation_rates,
        head_offsets=case.pattern.head_offsets,
    )
    out = dilated_attention(q, k, torch.ones_like(v), pattern, is_causal=case.is_causal)
    sees = pattern.materialize(case.seq_len, case.num_heads).sum(-1).T.clamp(max=1).float()
    torch.testing.assert_close(out, sees[None, :, :, None].expand_as(out), rtol=0, atol=1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_one_wide_branch_is_pytorchs_attention(is_causal):
    q, k, v = _tensors(2, 50, 4, 16, dtype=torch.float32)
    expected = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=is_causal, scale=0.3
    ).transpose(1, 2)
    pattern = DilatedPattern([64], [1])
    out = dilated_attention(q, k, v, pattern, is_causal=is_causal, scale=0.3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_gradcheck(backend, is_causal):
    tensors = _tensors(1, 7, 2, 2)
    for pattern in (DilatedPattern([3, 7], [1, 2], padding="attended"), DilatedPattern([5], [2])):
        assert torch.autograd.gradcheck(
            lambda q, k, v, pattern=pattern: dilated_attention(
                q, k, v, pattern, is_causal=is_causal, backend=backend
            ),
            tensors,
        )


def test_only_needed_gradients_are_returned():
    q, k, v = _tensors(1, 20, 4, 8)
    k.requires_grad_(False)
    dilated_attention(q, k, v, PATTERN).sum().backward()
    assert k.grad is None
    assert q.grad is not None


@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (2, 0, 2, 4), (2, 5, 0, 4)])
def test_nothing_in_nothing_out(shape):
    q, k, v = _tensors(*shape)
    result = dilated_attention_with_lse(q, k, v, PATTERN)
    assert result.out.shape == shape
    assert result.lse.shape == shape[:-1]
    result.out.sum().backward()
    assert q.grad.shape == shape


# opcheck reads .grad of the tensors it compares, leaves or not.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("dense", torch.float32),
        ("tail, batch, causal", torch.float64),
        ("tail, batch", torch.bfloat16),
        ("empty rows", torch.float32),
        ("masked, grouped queries, attended", torch.float64),
        ("packed", torch.float32),
    ],
)
def test_opcheck(name, dtype):
    case = next(case for case in AWKWARD_CASES if case.name == name)
    q, k, v, dout = case.tensors(dtype=dtype)
    dropout_p, seed = (0.2, torch.tensor(7)) if name == "dense" else (0.0, None)
    text = ops.encode_options(
        case.pattern,
        is_causal=case.is_causal,
        backend="auto",
        max_workspace_bytes=None,
    )
    masks = (case.options()["key_padding_mask"], case.options()["cu_seqlens"])
    options = (0.5, dropout_p, text, seed, *masks)
    if case.documents:
        q, k, v, dout = (x.detach().unsqueeze(0).requires_grad_() for x in (q, k, v, dout))
    torch.library.opcheck(ops.attention_forward, (q, k, v, *options))
    with torch.no_grad():
        out, lse = ops.attention_forward(q, k, v, *options)
        for dlse in (None, torch.randn_like(lse)):
            torch.library.opcheck(
                ops.attention_backward, (dout, dlse, q.detach(), k, v, out, lse, *options)
            )


def test_compiles_without_a_graph_break_for_any_length():
    compiled = torch.compile(
        lambda q, k, v: dilated_attention(q * 2, k, v, PATTERN, is_causal=True) * 2,
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for length in (50, 37, 64):
        q, k, v = _tensors(2, length, 4, 8)
        out = compiled(q, k, v)
        exact = 2 * reference_dilated_attention(q * 2, k, v, PATTERN, is_causal=True)
        assert relative_error(out, exact) < 1e-13
        dout = torch.randn_like(out)
        got = torch.autograd.grad(out, (q, k, v), dout)
        want = torch.autograd.grad(exact, (q, k, v), dout)
        assert all(relative_error(a, e) < 1e-12 for a, e in zip(got, want, strict=True))


def test_activation_checkpointing_gives_the_same_gradients():
    q, k, v = _tensors(1, 50, 4, 8)
    dout = torch.randn_like(q)
    plain = torch.autograd.grad(dilated_attention(q, k, v, PATTERN), (q, k, v), dout)
    out = checkpoint(dilated_attention, q, k, v, PATTERN, use_reentrant=False)
    again = torch.autograd.grad(out, (q, k, v), dout)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_one_pair_is_saved_for_all_branches():
    """What backward keeps does not grow with the number of branches."""

    def saved_bytes(pattern):
        q, k, v = _tensors(1, 64, 4, 8, dtype=torch.float32)
        storages = {}

        def pack(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            dilated_attention(q, k, v, pattern)
        return sum(storages.values())

    one, five = DilatedPattern([64], [1]), DilatedPattern([8, 16, 32, 64, 64], [1, 2, 4, 8, 16])
    assert saved_bytes(one) == saved_bytes(five) == 4 * 64 * 4 * (4 * 8 + 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": "x"}, TypeError, "q is a str; it must be a tensor"),
        ({"pattern": [4]}, TypeError, "pattern is a list; it must be a DilatedPattern, such as"),
        ({"v": torch.zeros(5, 2, 4)}, ValueError, r"v has shape \(5, 2, 4\); it must have the four "
         r"dimensions \(batch, sequence, heads, head_dim\)"),
        ({"k": torch.zeros(1, 6, 2, 4)}, ValueError, "dilated attention is self-attention, so they "
         "must be equal but for the heads"),
        ({"k": torch.zeros(1, 5, 1, 4)}, ValueError, "must be equal but for the heads"),
        ({n: torch.zeros(1, 5, 4, 4) for n in "kv"}, ValueError, "q has 2 heads and k and v 4"
         "; the heads of k and v must divide those of q"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0; it must be at least 0 and below 1"),
        ({"dropout_p": "0"}, TypeError, "dropout_p is '0'; it must be a number"),
        ({"dropout_p": 0.1, "backend": "sdpa"}, ValueError, "backend 'sdpa' cannot run .* dropout"
         "_p is 0.1; it has no dropout"),
        ({"k": torch.zeros(1, 5, 2, 4, dtype=torch.float64)}, TypeError, "q, k and v have dtypes "
         "torch.float32, torch.float64 and torch.float32; they must be equal, so convert"),
        ({n: torch.zeros(1, 5, 2, 4, dtype=torch.int64) for n in "qkv"}, TypeError,
         "q, k and v have dtype torch.int64; it must be a floating-point dtype"),
        ({"q": torch.zeros(1, 5, 2, 4, device="meta")}, ValueError, "q, k and v are on meta, cpu "
         "and cpu; they must be on one device"),
        ({n: torch.zeros(1, 5, 2, 0) for n in "qkv"}, ValueError, "head_dim must be at least 1"),
        ({"scale": "1"}, TypeError, "scale is '1'; it must be a number, or None for"),
        ({"scale": float("nan")}, ValueError, "scale is nan; it must be finite"),
        ({"backend": "none"}, ValueError, "backend is 'none'; it must be 'auto' or one of"),
    ],
)  # fmt: skip
def test_mistakes(change, error, message):
    arguments = dict.fromkeys("qkv", torch.zeros(1, 5, 2, 4)) | {"pattern": PATTERN} | change
    for function in (dilated_attention, dilated_attention_with_lse):
        with pytest.raises(error, match=message):
            function(**arguments)
