"""linear_cross_entropy against PyTorch's cross-entropy of whole logits, forward and backward."""

import math

import dilated_core.cross_entropy as module
import pytest
import torch
from dilated_core import linear_cross_entropy, memory_profile
from dilated_core.cross_entropy import chunk_tokens
from dilated_core.testing.error_budget import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

D, V = 6, 11


def problem(tokens=(2, 7), *, dtype=torch.float64, ignored=(), seed=0, width=D, classes=V):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in [(*tokens, width), (classes, width), (classes,)]
    )
    labels = torch.randint(classes, tokens, generator=generator)
    if ignored:
        labels[..., list(ignored)] = -100
    return hidden, weight, bias, labels


def gradients(loss, leaves, upstream=None):
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


def whole(hidden, weight, bias, labels, *, reduction="mean", upstream=None):
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    logits = linear(*leaves).view(-1, len(weight))
    if logits.dtype.itemsize == 2:
        logits = logits.float()
    loss = cross_entropy(logits, labels.flatten(), reduction=reduction)
    return gradients(loss.view(labels.shape) if reduction == "none" else loss, leaves, upstream)


def chunked(hidden, weight, bias, labels, *, upstream=None, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    loss = linear_cross_entropy(*leaves[:2], labels, bias=leaves[2], **options)
    return gradients(loss, leaves, upstream)


def assert_close(actual, exact):
    torch.testing.assert_close(actual, exact, rtol=1e-11, atol=1e-13)


@pytest.fixture
def chunks_of(monkeypatch):
    """A function that sets the number of tokens in a chunk."""
    return lambda size: monkeypatch.setattr(module, "chunk_tokens", lambda classes: size)


@given(
    tokens=st.sampled_from([(), (1,), (9,), (2, 7), (3, 1, 5), (2, 0)]),
    size=st.integers(1, 20),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    share=st.floats(0, 0.7),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_loss_and_gradients_are_those_of_whole_logits(tokens, size, reduction, share, seed):
    hidden, weight, bias, labels = problem(tokens, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    labels[torch.rand(tokens, generator=generator) < share] = -100
    shape = tokens if reduction == "none" else ()
    upstream = torch.randn(*shape, 2, generator=generator, dtype=torch.float64)[..., 0]  # strided
    exact = whole(hidden, weight, bias, labels, reduction=reduction, upstream=upstream)
    if not (labels != -100).any():
        exact = [torch.zeros_like(x) for x in exact]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "chunk_tokens", lambda classes: size)
        actual = chunked(hidden, weight, bias, labels, reduction=reduction, upstream=upstream)
    assert_close(actual, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_bits_are_those_of_whole_logits(chunks_of, dtype, reduction):
    """In one chunk all of them; in several those of the loss and the gradient of hidden."""
    hidden, weight, bias, _ = data = problem(
        (4, 700), dtype=dtype, ignored=(3, 9), width=48, classes=301
    )
    exact = whole(*data, reduction=reduction)
    one = chunked(*data, reduction=reduction)
    assert all(torch.equal(a, b) for a, b in zip(one[:2], exact[:2], strict=True))
    if dtype == torch.float32:  # a product of 16-bit numbers is not rounded to 16 bits
        assert torch.equal(one[2], exact[2])
    # The same bits for parts of the rows are a property of this machine's matrix products.
    products = linear(hidden.view(-1, 48), weight, bias)
    for size in (256, 512, 1024):
        chunks_of(size)
        parts = [linear(hidden.view(-1, 48)[x], weight, bias) for x in module._chunks(2800, size)]
        assert torch.equal(torch.cat(parts), products)
        several = chunked(*data, reduction=reduction)
        assert torch.equal(several[0], exact[0])
        assert torch.equal(several[1], exact[1])
        again = chunked(*data, reduction=reduction)
        assert all(torch.equal(a, b) for a, b in zip(again, several, strict=True))


def test_a_chunk_depends_on_the_classes_alone():
    assert [chunk_tokens(n) for n in (1, 256, 1000, 32_768, 200_000)] == [
        1 << 25,
        1 << 17,
        1 << 15,
        1 << 10,
        1 << 10,
    ]
    for tokens in (0, 1, 6, 7, 8, 15, 100):
        parts = list(module._chunks(tokens, 4))
        assert [i for x in parts for i in range(x.start, x.stop)] == list(range(tokens))
        assert all(x.stop - x.start == 4 for x in parts[:-1])
        assert not parts[1:] or 2 <= parts[-1].stop - parts[-1].start < 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_within_twice_those_of_whole_logits(chunks_of, dtype):
    data = problem((4, 64), dtype=dtype)
    exact = whole(*(x.double() for x in data[:3]), data[3])
    chunks_of(40 if dtype == torch.float32 else 2)  # no rounding to 16 bits after each of 128
    plain, ours = whole(*data), chunked(*data)
    for name, a, b, c in zip(("loss", "hidden", "weight", "bias"), ours, plain, exact, strict=True):
        assert a.dtype == (torch.float32 if name == "loss" else dtype)
        assert relative_error(a, c) <= 2 * relative_error(b, c) + torch.finfo(a.dtype).eps, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_on_a_gpu(dtype):
    data = [x.cuda() for x in problem((1, 3000), dtype=dtype, width=64, classes=40_000)]
    exact = whole(*(x.double() for x in data[:3]), data[3])
    plain, ours = whole(*data), chunked(*data)  # three chunks
    for name, a, b, c in zip(("loss", "hidden", "weight", "bias"), ours, plain, exact, strict=True):
        assert relative_error(a, c) <= 2 * relative_error(b, c) + torch.finfo(a.dtype).eps, name
    assert all(torch.equal(a, b) for a, b in zip(chunked(*data), ours, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_small_gradients_survive_float16(reduction):
    """One label among 2^27 of the batch: (p − 1)/2^27 alone is 0 in float16."""
    hidden = torch.full((1, D), 2.0**13, dtype=torch.float16)
    weight = torch.zeros(V, D, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(1, dtype=torch.int64)
    if reduction == "mean":
        linear_cross_entropy(hidden, weight, labels, count=2**27).backward()
    else:
        (linear_cross_entropy(hidden, weight, labels, reduction="none").sum() / 2**27).backward()
    expected = torch.full((D,), (1 / V - 1) * 2.0 ** (13 - 27))
    torch.testing.assert_close(weight.grad[0].float(), expected, rtol=2e-3, atol=0)


def test_parts_divided_by_one_count_are_the_whole():
    hidden, weight, bias, labels = problem((5, 8), ignored=(2,))
    exact = whole(hidden, weight, bias, labels)
    for count in (35, torch.tensor(35)):
        parts = [chunked(hidden[i], weight, bias, labels[i], count=count) for i in range(5)]
        loss, d_hidden, d_weight, d_bias = zip(*parts, strict=True)
        assert_close([sum(loss), torch.stack(d_hidden), sum(d_weight), sum(d_bias)], exact)


def test_tokens_without_a_label_are_skipped_whatever_they_hold():
    hidden, weight, bias, labels = problem(ignored=(1, 2))
    expected = chunked(hidden, weight, bias, labels)
    hidden[:, 1:3] = math.nan
    for actual, exact in zip(chunked(hidden, weight, bias, labels), expected, strict=True):
        assert torch.equal(actual, exact)
    labels[:] = 7
    nothing = chunked(hidden, weight, bias, labels, ignore_index=7)
    assert not any(result.any() for result in nothing)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_that_of_linear(inside):
    hidden, weight, bias, labels = problem(dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        exact = cross_entropy(linear(*leaves).float().flatten(0, 1), labels.flatten())
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        grads = torch.autograd.grad(loss, leaves)
    assert torch.equal(loss, exact)
    for actual, plain in zip(grads, torch.autograd.grad(exact, leaves), strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, plain, rtol=0.02, atol=1e-3)


def test_only_the_gradients_that_are_needed():
    hidden, weight, _, labels = problem()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels)
    exact = cross_entropy(linear(hidden, weight).flatten(0, 1), labels.flatten())
    assert_close(torch.autograd.grad(loss, weight), torch.autograd.grad(exact, weight))


def test_peak_memory_is_below_a_twentieth_of_whole_logits(chunks_of):
    tokens, classes = 4096, 4096
    hidden = torch.randn(tokens, 8, requires_grad=True)
    weight = torch.randn(classes, 8, requires_grad=True)
    labels = torch.randint(classes, (tokens,))
    chunks_of(32)
    with memory_profile() as profile:
        linear_cross_entropy(hidden, weight, labels).backward()
    assert profile.peak_bytes < tokens * classes * 4 / 20


def test_it_compiles_as_one_graph(chunks_of):
    data = problem(dtype=torch.float32)
    chunks_of(5)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    leaves = [x.detach().clone().requires_grad_() for x in data[:3]]
    loss = compiled(*leaves[:2], data[3], bias=leaves[2])
    torch.testing.assert_close(gradients(loss, leaves), chunked(*data), rtol=1e-5, atol=1e-6)
    arguments = (data[0].view(14, D), data[1], data[2], data[3].view(14), torch.rand(14), -100)
    torch.library.opcheck(
        torch.ops.dilated_core.cross_entropy_chunks.default,
        (*arguments, [True] * 3),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_flop_counters_count_each_product():
    hidden, weight, _, labels = problem()
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight.requires_grad_(), labels)
    assert counter.get_total_flops() == 2 * 2 * 14 * V * D


def test_checkpoints_transforms_and_meta_tensors():
    hidden, weight, _, labels = data = problem()
    exact = whole(*data)
    leaves = [x.detach().clone().requires_grad_() for x in data[:3]]

    def loss_of(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, labels, bias=bias)

    loss = checkpoint(loss_of, *leaves, use_reentrant=False)
    assert_close(gradients(loss, leaves), exact)
    grads = torch.func.grad(loss_of, argnums=(0, 1, 2))(*data[:3])
    assert_close(list(grads), exact[1:])
    meta = linear_cross_entropy(*(x.to("meta") for x in (hidden, weight, labels)))
    assert (meta.shape, meta.device.type) == ((), "meta")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": [1]}, TypeError, "hidden is a list; it must be a tensor"),
        ({"weight": torch.zeros(V, D)}, TypeError, "weight has dtype torch.float32 and hidden"),
        ({"hidden": torch.zeros(2, 7, D).long()}, TypeError, "hidden has dtype torch.int64"),
        (
            {"weight": torch.zeros(V, 5).double()},
            ValueError,
            r"must be \(…, D\) and \(classes, D\)",
        ),
        ({"labels": torch.zeros(2, 6).long()}, ValueError, "each token of hidden must have one"),
        ({"labels": torch.zeros(2, 7)}, TypeError, "labels has dtype torch.float32"),
        ({"labels": torch.full((2, 7), V)}, ValueError, "labels holds 11 and weight has 11 rows"),
        ({"labels": torch.full((2, 7), -1)}, ValueError, "labels holds -1 and weight has 11 rows"),
        ({"bias": torch.zeros(3).double()}, ValueError, "bias must have one entry per class"),
        (
            {"weight": torch.zeros(V, D, device="meta").double()},
            ValueError,
            "weight is on meta and hidden on cpu",
        ),
        ({"weight": None}, TypeError, "weight is a NoneType; it must be a tensor"),
        ({"ignore_index": None}, TypeError, "ignore_index is None"),
        ({"reduction": "max"}, ValueError, "reduction is 'max'; it must be one of 'mean'"),
        ({"count": -1}, ValueError, "count is -1; it must be at least 0"),
        ({"count": 3, "reduction": "sum"}, ValueError, 'count is given with reduction="sum"'),
    ],
)
def test_mistakes_have_a_sentence(change, error, message):
    names = ("hidden", "weight", "bias", "labels")
    with pytest.raises(error, match=message):
        linear_cross_entropy(**(dict(zip(names, problem(), strict=True)) | change))


def test_a_dtensor_is_refused():
    hidden, weight, _, labels = problem()
    weight.placements = ()  # what tells a DTensor, whose import takes seconds
    with pytest.raises(TypeError, match=r"weight is a DTensor; it must be a plain tensor, so call"):
        linear_cross_entropy(hidden, weight, labels)
