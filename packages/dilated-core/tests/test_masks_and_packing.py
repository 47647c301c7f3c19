"""Key padding masks and packed documents, beyond their equality with the oracle.

That equality, on random masks, documents and patterns, is in test_conformance.py.
"""

import pytest
import torch
from dilated_core import (
    DilatedPattern,
    dilated_attention,
    dilated_attention_with_lse,
    reference_dilated_attention_with_lse,
)
from dilated_core.testing import relative_error

PATTERN = DilatedPattern([8, 24, 40], [1, 3, 4])


def _tensors(*shape, kv_heads=None, dtype=torch.float64):
    *rows, H, D = shape
    return [
        torch.randn(*rows, heads, D, dtype=dtype, requires_grad=True)
        for heads in (H, kv_heads or H, kv_heads or H)
    ]


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_padded_batch_equals_each_sequence_alone(is_causal, backend):
    lengths = [50, 1, 33]
    q, k, v = _tensors(3, 50, 4, 8, kv_heads=2)
    padding = torch.arange(50) >= torch.tensor(lengths)[:, None]
    dout = torch.randn_like(q).masked_fill(padding[..., None, None], 0)
    options = {"is_causal": is_causal, "backend": backend}
    out = dilated_attention(q, k, v, PATTERN, key_padding_mask=padding, **options)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    for b, length in enumerate(lengths):
        alone = [x[b : b + 1, :length].detach().requires_grad_() for x in (q, k, v)]
        expected = dilated_attention(*alone, PATTERN, **options)
        assert relative_error(out[b : b + 1, :length], expected) < 1e-13
        wanted = torch.autograd.grad(expected, alone, dout[b : b + 1, :length])
        for grad, want in zip(grads, wanted, strict=True):
            # Not relative: the gradients of a softmax over one key are 0.
            assert (grad[b : b + 1, :length] - want).abs().max() < 1e-12
            assert (grad[b, length:] == 0).all()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_documents_equal_each_document_alone(is_causal, backend):
    lengths = [20, 1, 7, 7, 65]
    q, k, v = _tensors(100, 4, 8, kv_heads=2)
    dout = torch.randn_like(q)
    options = {"is_causal": is_causal, "backend": backend}
    cu_seqlens = torch.tensor([0, 20, 21, 28, 35, 100])
    out, lse = dilated_attention_with_lse(q, k, v, PATTERN, cu_seqlens=cu_seqlens, **options)
    assert lse.shape == (100, 4)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        rows = slice(start, start + length)
        alone = [x[None, rows].detach().requires_grad_() for x in (q, k, v)]
        expected = dilated_attention(*alone, PATTERN, **options)
        assert relative_error(out[None, rows], expected) < 1e-13
        wanted = torch.autograd.grad(expected, alone, dout[None, rows])
        for grad, want in zip(grads, wanted, strict=True):
            assert (grad[None, rows] - want).abs().max() < 1e-12


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_keys_are_zero_with_finite_gradients(dtype, backend):
    q, k, v = _tensors(2, 30, 4, 8, dtype=dtype)
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[0, :9] = mask[1] = True
    out, lse = dilated_attention_with_lse(
        q, k, v, DilatedPattern([8, 30], [1, 2]), is_causal=True, key_padding_mask=mask,
        backend=backend,
    )  # fmt: skip
    # Head 0 keeps even positions, so row 9 is the first to see a key, in its own segment of 8.
    assert (out[0, :9] == 0).all()
    assert (out[1] == 0).all()
    assert (lse[0, :9] == -torch.inf).all()
    assert lse[0, 9:].isfinite().all()
    grads = torch.autograd.grad(
        (out, lse), (q, k, v), (torch.randn_like(out), torch.ones_like(lse))
    )
    for grad in grads:
        assert grad.isfinite().all()
        assert (grad[1] == 0).all()
        assert (grad[0, :9] == 0).all()
        assert (grad[0, 9:] != 0).any()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradient_through_lse_with_masks_and_shared_heads(is_causal, backend):
    q, k, v = _tensors(2, 40, 6, 8, kv_heads=3)
    mask = torch.rand(2, 40) < 0.6
    dlse = torch.randn(2, 40, 6, dtype=torch.float64)
    options = {"is_causal": is_causal, "key_padding_mask": mask}
    lse = dilated_attention_with_lse(q, k, v, PATTERN, **options, backend=backend).lse
    exact = reference_dilated_attention_with_lse(q, k, v, PATTERN, **options).lse
    sees = exact > -torch.inf
    got = torch.autograd.grad(lse[sees], (q, k), dlse[sees])
    want = torch.autograd.grad(exact[sees], (q, k), dlse[sees])
    assert all(relative_error(a, e) < 1e-12 for a, e in zip(got, want, strict=True))


@pytest.mark.parametrize("is_causal", [False, True])
def test_eager_in_tiles_of_queries(monkeypatch, is_causal):
    """Long segments are done a few queries at a time, which see masks and keys as all do."""
    q, k, v = _tensors(2, 40, 6, 8, kv_heads=3)
    options = {"is_causal": is_causal, "key_padding_mask": torch.rand(2, 40) < 0.4}
    whole = dilated_attention(q, k, v, PATTERN, **options, backend="eager")
    dout = torch.randn_like(q)
    want = torch.autograd.grad(whole, (q, k, v), dout)
    monkeypatch.setattr("dilated_core.backends.eager._MAX_SCORES", 500)
    tiled = dilated_attention(q, k, v, PATTERN, **options, backend="eager")
    assert relative_error(tiled, whole) < 1e-13
    got = torch.autograd.grad(tiled, (q, k, v), dout)
    assert all(relative_error(a, e) < 1e-12 for a, e in zip(got, want, strict=True))


def test_masked_keys_do_not_matter():
    q, k, v = (x.detach() for x in _tensors(1, 40, 4, 8))
    mask = torch.rand(1, 40) < 0.5
    before = dilated_attention(q, k, v, PATTERN, key_padding_mask=mask)
    other = [torch.where(mask[..., None, None], torch.randn_like(x), x) for x in (k, v)]
    assert torch.equal(dilated_attention(q, *other, PATTERN, key_padding_mask=mask), before)


def test_documents_do_not_see_each_other():
    q, k, v = (x.detach() for x in _tensors(60, 4, 8))
    cu_seqlens = torch.tensor([0, 25, 60], dtype=torch.int32)
    before = dilated_attention(q, k, v, PATTERN, cu_seqlens=cu_seqlens)
    changed = [torch.cat([x[:25], torch.randn_like(x[25:])]) for x in (q, k, v)]
    after = dilated_attention(*changed, PATTERN, cu_seqlens=cu_seqlens)
    assert torch.equal(after[:25], before[:25])
    assert not torch.equal(after[25:], before[25:])


def test_dropout_of_masked_and_packed_calls_is_the_same_in_backward():
    """d out/d v of a call with dropout is the matrix that made out: out = J·v."""
    mask = torch.rand(2, 30) < 0.3
    documents = torch.tensor([0, 13, 26, 30])
    for shape, options in (
        ((2, 30, 4, 1), {"key_padding_mask": mask}),
        ((30, 4, 1), {"cu_seqlens": documents}),
    ):
        q, k, v = _tensors(*shape, kv_heads=2)

        def attend(v, q=q, k=k, options=options):
            torch.manual_seed(3)
            return dilated_attention(q, k, v, PATTERN, dropout_p=0.5, **options)

        jacobian = torch.autograd.functional.jacobian(attend, v.detach())
        again = (jacobian.flatten(-v.dim()) @ v.detach().flatten()).view(q.shape)
        torch.testing.assert_close(again, attend(v))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([True], TypeError, "key_padding_mask is a list; it must be a tensor"),
        (torch.zeros(1, 5), TypeError, "has dtype torch.float32; it must be bool, True for keys"),
        (torch.zeros(5, dtype=torch.bool), ValueError, r"has shape \(5,\) and q \(1, 5, 2, 4\); it "
         r"must be \(batch, sequence\)"),
        (torch.zeros(2, 5, dtype=torch.bool), ValueError, r"it must be \(batch, sequence\)"),
        (torch.zeros(1, 5, dtype=torch.bool, device="meta"), ValueError, "is on meta and q on cpu"),
    ],
)  # fmt: skip
def test_mistakes_in_masks(mask, error, message):
    x = torch.zeros(1, 5, 2, 4)
    with pytest.raises(error, match=message):
        dilated_attention(x, x, x, PATTERN, key_padding_mask=mask)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        ([0, 5], TypeError, r"cu_seqlens is a list; it must be an int32 or int64 tensor, such as"),
        (torch.tensor([0.0, 5.0]), TypeError, "has dtype torch.float32; it must be int32 or int64"),
        (torch.tensor([[0, 5]]), ValueError, r"has shape \(1, 2\); it must have one dimension"),
        (torch.tensor([0]), ValueError, r"has shape \(1,\); it must have one dimension, with"),
        (torch.tensor([1, 5]), ValueError, "cu_seqlens starts at 1; the first document begi"),
        (torch.tensor([0, 4, 2, 5]), ValueError, "goes from 4 to 2 at entry 2; it must not decre"),
        (torch.tensor([0, 4]), ValueError, "ends at 4 and q has 5 positions; the last document"),
        (torch.tensor([0, 6]), ValueError, "ends at 6 and q has 5 positions"),
    ],
)  # fmt: skip
def test_mistakes_in_packing(cu_seqlens, error, message):
    x = torch.zeros(5, 2, 4)
    with pytest.raises(error, match=message):
        dilated_attention(x, x, x, PATTERN, cu_seqlens=cu_seqlens)


def test_packed_tensors_have_three_dimensions():
    x, bounds = torch.zeros(1, 5, 2, 4), torch.tensor([0, 5])
    with pytest.raises(
        ValueError, match=r"q has shape \(1, 5, 2, 4\); with cu_seqlens it must hav"
    ):
        dilated_attention(x, x, x, PATTERN, cu_seqlens=bounds)
    mask = torch.zeros(1, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="key_padding_mask and cu_seqlens are both given"):
        dilated_attention(x[0], x[0], x[0], PATTERN, cu_seqlens=bounds, key_padding_mask=mask)
