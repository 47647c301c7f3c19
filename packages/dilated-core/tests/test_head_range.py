"""`head_range`: heads that are spread over devices give what they give together."""

import pytest
import torch
from dilated_core import DilatedPattern, dilated_attention, dilated_attention_with_lse
from dilated_core.testing import random_cases, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

PATTERN = DilatedPattern([8, 24, 40], [1, 3, 4], head_offsets="blocked")


def _close(a, b):
    return (a - b).abs().max() <= 1e-12 * (1 + b.abs().max()) if b.numel() else True


@settings(max_examples=60, deadline=None)
@given(
    case=random_cases(with_options=True),
    backend=st.sampled_from(["eager", "sdpa"]),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_any_range_equals_these_heads_of_the_whole(case, backend, shares):
    q, k, v, dout = case.tensors(dtype=torch.float64)
    H, K = q.shape[-2], k.shape[-2]
    first, stop = sorted(round(share * K) for share in shares)
    stop = max(stop, first + 1) if first < K else K
    first = min(first, K - 1)
    heads, kv_heads = slice(first * H // K, stop * H // K), slice(first, stop)
    out, lse = dilated_attention_with_lse(q, k, v, case.pattern, **case.options(), backend=backend)
    some = [q[..., heads, :], k[..., kv_heads, :], v[..., kv_heads, :]]
    part = dilated_attention_with_lse(
        *some, case.pattern, **case.options(), backend=backend, head_range=(heads.start, H)
    )
    assert _close(part.out, out[..., heads, :])
    assert torch.equal(part.lse.isinf(), lse[..., heads].isinf())
    assert _close(part.lse.nan_to_num(neginf=0), lse[..., heads].nan_to_num(neginf=0))
    got = torch.autograd.grad(part.out, some, dout[..., heads, :])
    want = torch.autograd.grad(out, (q, k, v), dout)
    for a, e, where in zip(got, want, (heads, kv_heads, kv_heads), strict=True):
        assert _close(a, e[..., where, :])


def test_compiled_and_in_forward_mode():
    q, k, v = torch.randn(3, 2, 50, 12, 8, dtype=torch.float64).unbind()
    tangent = torch.randn(2, 50, 6, 8, dtype=torch.float64)

    def attend(q, k, v):
        return dilated_attention(q, k, v, PATTERN, is_causal=True, head_range=(6, 12))

    last = [x[:, :, 6:] for x in (q, k, v)]
    whole = dilated_attention(q, k, v, PATTERN, is_causal=True)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(*last), whole[:, :, 6:]) < 1e-13
    padded = torch.cat([torch.zeros_like(tangent), tangent], 2)
    _, want = torch.func.jvp(
        lambda q: dilated_attention(q, k, v, PATTERN, is_causal=True), (q,), (padded,)
    )
    _, got = torch.func.jvp(lambda q: attend(q, *last[1:]), (last[0],), (tangent,))
    assert relative_error(got, want[:, :, 6:]) < 1e-13
    # The offsets matter: without the range these are other heads.
    assert relative_error(dilated_attention(*last, PATTERN, is_causal=True), whole[:, :, 6:]) > 0.1


@pytest.mark.parametrize(
    ("head_range", "error", "message"),
    [
        ((9, 12), ValueError, r"head_range is \(9, 12\) and there are 4 heads; the heads 9 to 12"),
        ((-1, 12), ValueError, "the first head of head_range is -1; it must be at least 0"),
        ((1.0, 12), TypeError, "the first head of head_range is 1.0; it must be an integer"),
        ((True, 12), TypeError, "the first head of head_range is True; it must be an integer"),
        ((0, "8"), TypeError, "the total of head_range is '8'; it must be an integer"),
        (4, TypeError, r"head_range is 4; it must be a pair \(first, total\), such as \(6, 12\)"),
        ((0, 1, 2), TypeError, r"head_range is \(0, 1, 2\); it must be a pair"),
    ],
)
def test_mistakes(head_range, error, message):
    x = torch.zeros(1, 5, 4, 4)
    with pytest.raises(error, match=message):
        dilated_attention(x, x, x, PATTERN, head_range=head_range)
