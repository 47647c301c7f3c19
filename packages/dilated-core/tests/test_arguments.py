"""Arguments are honoured or refused: booleans, names, dtypes under autocast, huge numbers."""

import numpy as np
import pytest
import torch
from dilated_core import (
    DilatedPattern,
    dilated_attention,
    dilated_attention_with_lse,
    reference_dilated_attention_with_lse,
)
from dilated_core.testing import relative_error
from torch.nn.functional import scaled_dot_product_attention

FUNCTIONS = [dilated_attention, dilated_attention_with_lse]
PATTERN = DilatedPattern([8, 24, 40], [1, 3, 4])


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("value", ["False", None, 0, 1, np.bool_(True), torch.tensor(True)])
def test_is_causal_is_a_bool(function, value):
    x = torch.zeros(1, 5, 2, 4)
    with pytest.raises(TypeError, match=r"is_causal is .*; it must be True or False"):
        function(x, x, x, PATTERN, is_causal=value)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("causal", True, "^NAME has no argument 'causal'; it is called is_causal"),
        ("softmax_scale", 0.1, "^NAME has no argument 'softmax_scale'; it is called scale"),
        ("attn_mask", None, "^NAME has no argument 'attn_mask'; its arguments are q, k, v, patt"),
        ("backend", ["x"], r"backend is \['x'\]; it must be 'auto' or the name of one of"),
        ("backend", None, "backend is None; it must be 'auto' or the name of one of"),
    ],
)
def test_names_and_types(function, name, value, message):
    x = torch.zeros(1, 5, 2, 4)
    with pytest.raises(TypeError, match=message.replace("NAME", function.__name__)):
        function(x, x, x, PATTERN, **{name: value})


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_autocast_keeps_float64(backend):
    tensors = [torch.randn(2, 50, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = dilated_attention_with_lse(*tensors, PATTERN, backend=backend)
        grads = torch.autograd.grad(out.sum() + lse.sum(), tensors)
    exact, exact_lse = reference_dilated_attention_with_lse(*tensors, PATTERN)
    wanted = torch.autograd.grad(exact.sum() + exact_lse.sum(), tensors)
    for a, e in zip((out, lse, *grads), (exact, exact_lse, *wanted), strict=True):
        assert a.dtype == torch.float64
        assert relative_error(a, e) < 1e-12


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64]


@pytest.mark.parametrize("k_dtype", DTYPES)
@pytest.mark.parametrize("v_dtype", DTYPES)
def test_autocast_takes_and_refuses_the_dtypes_that_pytorch_does(k_dtype, v_dtype):
    q = torch.randn(1, 20, 2, 8)
    k, v = (torch.randn(1, 20, 2, 8).to(dtype) for dtype in (k_dtype, v_dtype))
    with torch.autocast("cpu", torch.bfloat16):
        try:
            expected = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        except RuntimeError:
            with pytest.raises(TypeError, match=r"have dtypes .*; they must be equal, so convert"):
                dilated_attention(q, k, v, PATTERN)
        else:
            out = dilated_attention(q, k, v, DilatedPattern([20], [1]))
            assert out.dtype == expected.dtype == torch.bfloat16
            assert relative_error(out, expected.transpose(1, 2)) < 0.02


HUGE = [(2**63, 2**63), (2**100, 2**100), (8, 2**100), (2**63 - 1, 3), (2**100, 1)]
CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "masked": {"key_padding_mask": torch.arange(60).view(2, 30) % 3 == 0},
    "packed": {"cu_seqlens": torch.tensor([0, 7, 7, 30])},
}


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["masked", "attended"])
@pytest.mark.parametrize("call", CALLS)
def test_huge_lengths_and_rates(call, padding, backend):
    for w, r in HUGE:
        pattern = DilatedPattern([8, w], [1, r], padding=padding, head_offsets="blocked")
        shape = (30, 4, 8) if call == "packed" else (2, 30, 4, 8)
        tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        results = []
        for attend, options in (
            (dilated_attention_with_lse, {"backend": backend}),
            (reference_dilated_attention_with_lse, {}),
        ):
            out, lse = attend(*tensors, pattern, **CALLS[call], **options)
            total = out.sum() + lse[lse.isfinite()].sum()
            results.append((out, *torch.autograd.grad(total, tensors)))
        for a, e in zip(*results, strict=True):
            assert relative_error(a, e) < 1e-10


@pytest.mark.parametrize("function", FUNCTIONS)
def test_layouts_and_dtypes_without_arithmetic_are_refused(function):
    x = torch.zeros(1, 5, 2, 4)
    with pytest.raises(TypeError, match=r"q has layout torch.sparse_coo; it must be a dense"):
        function(x.to_sparse(), x, x, PATTERN)
    x = x.to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="float8_e4m3fn; it must be a floating-point dtype of 16"):
        function(x, x, x, PATTERN)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bounds_of_documents_have_values(function):
    x = torch.zeros(5, 2, 4)
    with pytest.raises(ValueError, match="cu_seqlens is on meta and holds no values"):
        function(x, x, x, PATTERN, cu_seqlens=torch.tensor([0, 5], device="meta"))


@pytest.mark.parametrize("dropout_p", [np.float32(0.5), np.float64(0.5)])
def test_dropout_is_any_number(dropout_p):
    x = torch.ones(1, 5, 2, 4)
    results = []
    for p in (0.5, dropout_p):
        torch.manual_seed(0)
        results.append(dilated_attention(x, x, x, PATTERN, dropout_p=p))
    assert torch.equal(*results)
