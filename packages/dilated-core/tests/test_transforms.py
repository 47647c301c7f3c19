"""Forward mode, torch.func and second derivatives equal those of the dense oracle."""

import pytest
import torch
from dilated_core import (
    DilatedAttention,
    DilatedPattern,
    dilated_attention,
    dilated_attention_with_lse,
    reference_dilated_attention,
    reference_dilated_attention_with_lse,
)
from dilated_core.testing import AWKWARD_CASES, random_cases, relative_error
from hypothesis import given, settings
from torch.autograd import forward_ad

PATTERN = DilatedPattern([3, 8], [1, 2], padding="attended")
ONE = torch.ones((), dtype=torch.float64)
BACKENDS = ["eager", "sdpa"]


def _tensors(*shape, count=3):
    return [torch.randn(*shape, dtype=torch.float64) for _ in range(count)]


def _attend(case, **options):
    return lambda q, k, v: dilated_attention_with_lse(
        q, k, v, case.pattern, **case.options(), **options
    )


def _exact(case):
    return lambda q, k, v: reference_dilated_attention_with_lse(
        q, k, v, case.pattern, **case.options()
    )


def _finite(results):
    """out and lse, where lse is not −∞: its tangent there is that of a constant."""
    return [x.masked_fill(x == -torch.inf, 0) for x in results]


def _compare_jvp(case, backend):
    q, k, v, _ = (x.detach() for x in case.tensors(dtype=torch.float64))
    tangents = tuple(torch.randn_like(x) for x in (q, k, v))
    got_result, got = torch.func.jvp(_attend(case, backend=backend), (q, k, v), tangents)
    exact, want = torch.func.jvp(lambda *x: tuple(_finite(_exact(case)(*x))), (q, k, v), tangents)
    for a, e in zip([*_finite(got_result), *got], [*exact, *want], strict=True):
        assert relative_error(a, e) < 1e-10


@pytest.mark.parametrize("case", AWKWARD_CASES, ids=lambda case: case.name)
def test_forward_mode_of_awkward_cases(case):
    _compare_jvp(case, "auto")


@settings(max_examples=50, deadline=None)
@given(case=random_cases(with_options=True, max_seq_len=40))
def test_forward_mode_of_any_case(case):
    _compare_jvp(case, "eager")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tangent_of_one_input_alone(backend):
    q, k, v = _tensors(1, 10, 2, 4)
    (t,) = _tensors(1, 10, 2, 4, count=1)
    for i in range(3):

        def of_one(function, x, i=i):
            inputs = [q, k, v]
            inputs[i] = x
            return function(*inputs, PATTERN)

        x = (q, k, v)[i]
        _, got = torch.func.jvp(
            lambda x: of_one(lambda *a: dilated_attention(*a, backend=backend), x), (x,), (t,)
        )
        _, want = torch.func.jvp(lambda x: of_one(reference_dilated_attention, x), (x,), (t,))
        assert got.abs().max() > 0.01
        assert relative_error(got, want) < 1e-12


# Of torch.func.linearize itself.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_dual_tensors_and_linearize():
    q, k, v = _tensors(2, 10, 2, 4)
    t = torch.randn_like(q)
    with forward_ad.dual_level():
        out = dilated_attention(forward_ad.make_dual(q, t), k, v, PATTERN)
        got = forward_ad.unpack_dual(out).tangent
    _, want = torch.func.jvp(lambda x: reference_dilated_attention(x, k, v, PATTERN), (q,), (t,))
    assert relative_error(got, want) < 1e-12
    _, linear = torch.func.linearize(lambda x: dilated_attention(x, k, v, PATTERN), q)
    assert relative_error(linear(t), want) < 1e-12


@pytest.mark.parametrize("is_causal", [False, True])
def test_jacobians(is_causal):
    q, k, v = _tensors(1, 7, 2, 2)
    attend = lambda *x: dilated_attention(*x, PATTERN, is_causal=is_causal)  # noqa: E731
    exact = lambda *x: reference_dilated_attention(*x, PATTERN, is_causal=is_causal)  # noqa: E731
    want = torch.func.jacrev(exact, argnums=(0, 1, 2))(q, k, v)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        got = transform(attend, argnums=(0, 1, 2))(q, k, v)
        assert all(relative_error(a, e) < 1e-12 for a, e in zip(got, want, strict=True))


def test_modules_have_forward_mode():
    attention = DilatedAttention([3, 8], [1, 2])
    q, k, v = _tensors(1, 10, 2, 4)
    t = torch.randn_like(q)
    _, got = torch.func.jvp(lambda x: attention(x, k, v), (q,), (t,))
    _, want = torch.func.jvp(
        lambda x: reference_dilated_attention(x, k, v, attention.pattern), (q,), (t,)
    )
    assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("name", ["masked, empty rows", "packed, causal", "grouped queries"])
def test_gradients_of_gradients(name):
    """Through out and lse, in q, k, v and the upstream gradients."""
    case = next(case for case in AWKWARD_CASES if case.name == name)
    q, k, v, dout = case.tensors(dtype=torch.float64)
    dout = dout.requires_grad_()
    dlse = torch.randn(q.shape[:-1], dtype=torch.float64, requires_grad=True)
    leaves = (q, k, v, dout, dlse)
    second = [torch.randn_like(x) for x in (q, k, v)]
    results = []
    for function in (_attend(case), _exact(case)):
        first = torch.autograd.grad(
            _finite(function(q, k, v)), (q, k, v), (dout, dlse), create_graph=True
        )
        results.append([*first, *torch.autograd.grad(first, leaves, second)])
    for a, e in zip(*results, strict=True):
        assert relative_error(a, e) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradgradcheck(backend):
    tensors = [x.requires_grad_() for x in _tensors(1, 6, 2, 2)]
    attend = lambda *x: dilated_attention(*x, PATTERN, backend=backend)  # noqa: E731
    assert torch.autograd.gradgradcheck(attend, tensors)
    assert torch.autograd.gradcheck(attend, tensors, check_forward_ad=True)


def test_func_grad_and_hessian():
    q, k, v = _tensors(1, 6, 2, 2)
    loss = lambda attend: lambda x: attend(x, k, v, PATTERN).square().sum()  # noqa: E731
    attend, exact = loss(dilated_attention), loss(reference_dilated_attention)
    assert relative_error(torch.func.grad(attend)(q), torch.func.grad(exact)(q)) < 1e-12
    assert relative_error(torch.func.hessian(attend)(q), torch.func.hessian(exact)(q)) < 1e-11


@pytest.mark.parametrize(
    "twice",
    [
        torch.func.hessian,
        lambda f: torch.func.jacrev(torch.func.grad(f)),
        lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
        lambda f: lambda x: torch.func.jvp(torch.func.grad(f), (x,), (ONE.expand_as(x),))[1],
    ],
    ids=["hessian", "reverse over reverse", "reverse over forward", "forward over reverse"],
)
def test_second_derivatives_of_a_sum(twice):
    """The gradient of a sum is expanded: all its elements share one place in memory."""
    (q,) = _tensors(1, 6, 2, 2, count=1)
    loss = lambda attend: lambda x: attend(x, x, x, PATTERN).sum()  # noqa: E731
    attend, exact = loss(dilated_attention), loss(reference_dilated_attention)
    assert relative_error(twice(attend)(q), twice(exact)(q)) < 1e-11


@pytest.mark.parametrize("inner", [lambda f: f, torch.func.grad], ids=["value", "gradient"])
def test_forward_mode_in_forward_mode_is_refused(inner):
    """PyTorch does not differentiate a forward rule in forward mode: the result would be wrong."""
    (q,) = _tensors(1, 6, 2, 2, count=1)
    f = inner(lambda x: dilated_attention(x, x, x, PATTERN).square().sum())
    with pytest.raises(ValueError, match="forward mode is nested in forward mode"):
        torch.func.jacfwd(torch.func.jacfwd(f))(q)


def test_vmap_is_a_larger_batch():
    q, k, v = _tensors(3, 2, 20, 4, 8)
    mask = torch.rand(3, 2, 20) < 0.3
    attend = lambda q, k, v, m: dilated_attention(q, k, v, PATTERN, key_padding_mask=m)  # noqa: E731
    got = torch.func.vmap(attend)(q, k, v, mask)
    want = attend(*(x.flatten(0, 1) for x in (q, k, v, mask))).unflatten(0, (3, 2))
    assert torch.equal(got, want)
    # Mapped over another dimension, and some inputs not at all.
    moved = q.movedim(0, 2)
    got = torch.func.vmap(attend, in_dims=(2, None, None, None))(moved, k[0], v[0], mask[0])
    want = torch.stack([attend(x, k[0], v[0], mask[0]) for x in q])
    torch.testing.assert_close(got, want)


def test_vmap_of_packed_documents_and_of_gradients():
    q, k, v = _tensors(3, 20, 4, 8)
    bounds = torch.tensor([0, 5, 5, 12, 20])
    attend = lambda q, k, v: dilated_attention(q, k, v, PATTERN, cu_seqlens=bounds)  # noqa: E731
    want = torch.stack([attend(*x) for x in zip(q, k, v, strict=True)])
    torch.testing.assert_close(torch.func.vmap(attend)(q, k, v), want)
    per_sample = torch.func.vmap(torch.func.grad(lambda *x: attend(*x).square().sum()))(q, k, v)
    x = q.clone().requires_grad_()
    (whole,) = torch.autograd.grad(
        sum(attend(*y).square().sum() for y in zip(x, k, v, strict=True)), x
    )
    assert relative_error(per_sample, whole) < 1e-12


def test_dropout_is_refused():
    q, k, v = _tensors(1, 10, 2, 4)
    attend = lambda x: dilated_attention(x, k, v, PATTERN, dropout_p=0.5)  # noqa: E731
    message = r"dropout_p is 0.5; forward mode, second derivatives and torch.func know dilated"
    with pytest.raises(ValueError, match=message):
        torch.func.jvp(attend, (q,), (q,))
    with pytest.raises(ValueError, match=message):
        torch.func.grad(lambda x: attend(x).sum())(q)
    leaf = q.clone().requires_grad_()
    out = attend(leaf)
    torch.autograd.grad(out.sum(), leaf, retain_graph=True)
    with pytest.raises(ValueError, match=message):
        torch.autograd.grad(out.sum(), leaf, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 4, 2), (1, 0, 4, 2)])
def test_derivatives_of_empty_tensors(shape, backend):
    q, k, v = _tensors(*shape)
    k, v = k[:, :, :2], v[:, :, :2]

    def f(*x):
        return dilated_attention(*x, PATTERN, backend=backend)

    assert torch.func.jvp(f, (q, k, v), (q, k, v))[1].shape == shape
    assert torch.func.jacrev(f)(q, k, v).shape == (*shape, *shape)
    q.requires_grad_()
    (dq,) = torch.autograd.grad(f(q, k, v).sum(), q, create_graph=True)
    assert torch.autograd.grad(dq.sum(), q)[0].shape == shape


def test_jacobian_of_an_empty_packed_sequence():
    q, k, v = _tensors(0, 2, 4)
    cu_seqlens = torch.tensor([0, 0, 0])
    jacobian = torch.func.jacrev(
        lambda x: dilated_attention_with_lse(x, k, v, PATTERN, cu_seqlens=cu_seqlens)
    )(q)
    assert [tuple(x.shape) for x in jacobian] == [(0, 2, 4, 0, 2, 4), (0, 2, 0, 2, 4)]


@pytest.mark.filterwarnings("ignore:.*performance drop.*")
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_gradients_at_once(backend, is_packed, create_graph):
    shape = (9, 2, 4) if is_packed else (2, 9, 2, 4)
    q, k, v = (x.requires_grad_() for x in _tensors(*shape))
    cu_seqlens = torch.tensor([0, 3, 3, 9]) if is_packed else None
    results = dilated_attention_with_lse(q, k, v, PATTERN, cu_seqlens=cu_seqlens, backend=backend)
    grads = [torch.randn(3, *x.shape, dtype=x.dtype) for x in results]
    for chosen in ([0], [1], [0, 1]):
        outputs, upstream = [results[i] for i in chosen], [grads[i] for i in chosen]
        options = {"retain_graph": True, "create_graph": create_graph, "allow_unused": True}
        got = torch.autograd.grad(outputs, (q, k), upstream, is_grads_batched=True, **options)
        for n in range(3):
            one = [x[n] for x in upstream]
            want = torch.autograd.grad(outputs, (q, k), one, **options)
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g[n], w, rtol=0, atol=1e-12)
