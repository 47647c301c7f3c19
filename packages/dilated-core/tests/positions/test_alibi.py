"""ALiBi through channels of q and k is the dense bias, at every position and in every dtype."""

import math

import pytest
import torch
from dilated_core import (
    DilatedPattern,
    alibi_bias,
    alibi_slopes,
    dilated_attention,
    dilated_attention_with_lse,
    with_alibi,
)
from dilated_core.testing import relative_error

PATTERN = DilatedPattern([32, 128], [1, 4])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def oracle(q, k, v, positions, *, scale, slopes):
    """Dense float64 attention over the pattern's counts, with the bias added to the scores."""
    q, k, v = (x.double() for x in (q, k, v))
    S, H = q.shape[1:3]
    k, v = (x.repeat_interleave(H // x.shape[2], dim=2) for x in (k, v))
    bias = alibi_bias(positions, positions, slopes, dtype=torch.float64)
    counts = PATTERN.materialize(S, H, is_causal=True)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale + bias + counts.double().log()
    out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    return out, scores.logsumexp(-1).transpose(1, 2)


def attend(q, k, v, positions, *, backend="auto", **options):
    q2, k2, v2, scale = with_alibi(q, k, v, positions, **options)
    out, lse = dilated_attention_with_lse(
        q2, k2, v2, PATTERN, is_causal=True, scale=scale, backend=backend
    )
    assert not out[..., q.shape[-1] :].any()
    return out[..., : q.shape[-1]], lse


def test_slopes_are_the_papers():
    # "for 8 heads 1/2¹, 1/2², ..., 1/2⁸; for 16 heads we interpolate": section 3.
    assert alibi_slopes(8) == tuple(2.0**-h for h in range(1, 9))
    assert alibi_slopes(16) == pytest.approx([2 ** -(h / 2) for h in range(1, 17)])
    # 12 heads in the authors' code: those of 8, then every second one of 16.
    assert alibi_slopes(12) == alibi_slopes(8) + alibi_slopes(16)[0:8:2]
    assert [len(alibi_slopes(h)) for h in (1, 3, 5, 40)] == [1, 3, 5, 40]
    with pytest.raises(ValueError, match="num_heads is 0; it must be at least 1"):
        alibi_slopes(0)
    with pytest.raises(TypeError, match=r"num_heads is 8\.0; it must be an integer"):
        alibi_slopes(8.0)


# 12 heads: slopes beyond powers of two. The sequences cross multiples of 2⁸, 2¹² and 2¹⁶, where
# digits carry, and end at the last position allowed.
LAST = [200, 2**12 + 90, 2**16 + 90, 2**20 + 90, 2**24 - 1]


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize(("num_heads", "head_dim"), [(8, 64), (12, 32)])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_dense_oracle(dtype, backend, num_heads, head_dim, last):
    q, k, v = torch.randn(3, 1, 200, num_heads, head_dim).to(dtype).unbind()
    positions = torch.arange(200) + last - 199
    scale, slopes = 1 / math.sqrt(head_dim), alibi_slopes(num_heads)
    expected, _ = oracle(q, k, v, positions, scale=scale, slopes=slopes)
    out, _ = attend(q, k, v, positions, backend=backend)
    unbiased, _ = oracle(q, k, v, positions, scale=scale, slopes=[0.0] * num_heads)
    plain = dilated_attention(q, k, v, PATTERN, is_causal=True, backend=backend)
    # Without a bias, twice; and what the accumulator may lose, in whatever order it sums.
    accumulator_eps = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    allowed = 2 * relative_error(plain, unbiased) + torch.finfo(dtype).eps
    allowed += max(slopes) * last * accumulator_eps
    assert relative_error(out, expected) <= allowed


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("num_heads", [8, 12])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_summed_in_order_no_position_costs_accuracy(dtype, num_heads, last):
    q, k, v = torch.zeros(3, 1, 200, num_heads, 1, dtype=dtype).unbind()
    positions = torch.arange(200) + last - 199
    q2, k2, _, scale = with_alibi(q, k, v, positions, scale=128**-0.5)
    scores = torch.zeros(num_heads, 200, 200)  # a float32 accumulator
    for channel in range(q2.shape[-1]):
        rows, columns = q2[0, :, :, channel].float().T, k2[0, :, :, channel].float().T
        scores += rows[:, :, None] * columns[:, None, :]
    expected = alibi_bias(positions, positions, alibi_slopes(num_heads), dtype=torch.float64)
    error = scores.double() * scale - expected
    error -= error.diagonal(dim1=1, dim2=2)[:, :, None]  # what all keys of a query share cancels
    error = torch.where(expected > -30, error, 0)  # beyond, probabilities vanish
    assert error.abs().max() < max(30 * 2.0**-21, torch.finfo(dtype).eps / 4)


def test_lse_is_that_of_the_biased_scores():
    q, k, v = torch.randn(3, 2, 200, 12, 16).unbind()
    positions = torch.arange(200)
    _, expected = oracle(q, k, v, positions, scale=0.3, slopes=alibi_slopes(12))
    _, lse = attend(q, k, v, positions, scale=0.3)
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=3e-5)


def test_grouped_queries_and_gradients():
    q = torch.randn(1, 150, 6, 12, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 150, 2, 12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    positions = torch.arange(150) + 1000
    options = {"scale": -0.4, "slopes": [0.3, 0.0, 1.5, 1e-3, 0.11, 0.7]}
    expected, _ = oracle(q, k, v, positions, **options)
    out, _ = attend(q, k, v, positions, **options)
    assert relative_error(out, expected) < 1e-11
    dout = torch.randn_like(out)
    for actual, exact in zip(
        torch.autograd.grad(out, (q, k, v), dout),
        torch.autograd.grad(expected, (q, k, v), dout),
        strict=True,
    ):
        assert relative_error(actual, exact) < 1e-11


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_shard_is_widened_as_the_whole_is(dtype):
    q, k, v = torch.randn(3, 1, 96, 12, 16).to(dtype).unbind()
    positions = torch.arange(96) + 70_000
    whole = with_alibi(q, k, v, positions)
    rows = with_alibi(*(x[:, 32:64] for x in (q, k, v)), positions[32:64])
    heads = with_alibi(*(x[:, :, 8:] for x in (q, k, v)), positions, slopes=alibi_slopes(12)[8:])
    for a, b, c in zip(whole[:3], rows[:3], heads[:3], strict=True):
        assert torch.equal(a[:, 32:64], b)
        assert torch.equal(a[:, :, 8:], c)
        assert a.dtype == dtype


@pytest.mark.parametrize("total", [8, 12])
def test_a_range_of_heads_is_a_slice_of_all(total):
    q, k, v = torch.randn(3, 1, 96, total, 16).unbind()
    positions = torch.arange(96)
    whole = with_alibi(q, k, v, positions)
    for first, stop in ((0, 3), (3, 7), (5, total)):
        heads = (x[:, :, first:stop] for x in (q, k, v))
        part = with_alibi(*heads, positions, head_range=(first, total))
        for a, b in zip(whole[:3], part[:3], strict=True):
            assert torch.equal(a[:, :, first:stop], b)
        slopes = alibi_slopes(stop - first, head_range=(first, total))
        assert slopes == alibi_slopes(total)[first:stop]
    with pytest.raises(ValueError, match=r"head_range is \(6, 8\) and there are 3 heads"):
        alibi_slopes(3, head_range=(6, 8))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_positions_of_every_integer_dtype(dtype):
    q, k, v = torch.randn(3, 1, 60, 4, 16).unbind()
    wide = torch.arange(60) + 60
    for a, b in zip(with_alibi(q, k, v, wide), with_alibi(q, k, v, wide.to(dtype)), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    slopes = alibi_slopes(4)
    want = alibi_bias(wide, wide, slopes)
    assert torch.equal(alibi_bias(wide.to(dtype), wide.to(dtype), slopes), want)


def test_tensors_are_made_on_the_device_of_the_data():
    q, k, v = torch.randn(3, 1, 60, 4, 16).unbind()
    positions = torch.arange(60)
    want, bias = with_alibi(q, k, v, positions), alibi_bias(positions, positions, alibi_slopes(4))
    with torch.device("meta"):  # what torch.set_default_device("meta") does
        got = with_alibi(q, k, v, positions)
        assert torch.equal(alibi_bias(positions, positions, alibi_slopes(4)), bias)
    for a, b in zip(got[:3], want[:3], strict=True):
        assert torch.equal(a, b)
    shapes = with_alibi(*(x.to("meta") for x in (q, k, v)), positions.to("meta"))
    assert [x.shape for x in shapes[:3]] == [x.shape for x in want[:3]]


def test_overlapping_and_expanded_inputs():
    """Widening copies, so any strides will do."""
    u = torch.randn(1, 30).unfold(-1, 8, 1)[:, :, None].expand(2, -1, 4, -1)
    for a, b in zip(
        with_alibi(u, u, u, torch.arange(23)),
        with_alibi(*(u.contiguous() for _ in "qkv"), torch.arange(23)),
        strict=True,
    ):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_bias_mistakes():
    with pytest.raises(TypeError, match=r"k_positions has dtype torch.float32; it must be an int"):
        alibi_bias(torch.arange(3), torch.arange(3.0), [1.0])
    with pytest.raises(TypeError, match=r"slopes is \{1\.0\}; it must be a list of numbers"):
        alibi_bias(torch.arange(3), torch.arange(3), {1.0})
    with pytest.raises(ValueError, match=r"q_positions has shape \(1, 3\); it must have one dim"):
        alibi_bias(torch.arange(3)[None], torch.arange(3), [1.0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths_are_multiples_of_eight(dtype):
    extra = 8 if dtype in (torch.float64, torch.float32) else 16
    for head_dim in (1, 8, 20, 64, 128):
        q, k, v, _ = with_alibi(*torch.randn(3, 1, 4, 2, head_dim).to(dtype), torch.arange(4))
        width = -(-head_dim // 8) * 8 + extra
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] == width


def test_no_graph_break():
    q, k, v = torch.randn(3, 1, 40, 4, 8).unbind()
    positions = torch.arange(40)
    compiled = torch.compile(with_alibi, backend="eager", fullgraph=True)
    for a, b in zip(compiled(q, k, v, positions), with_alibi(q, k, v, positions), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.randn(4, 2, 8)}, ValueError, r"q has shape \(4, 2, 8\); it must have t"),
        ({"k": torch.randn(1, 4, 2, 8).double()}, TypeError, "q has dtype torch.float32 and k tor"),
        ({"v": torch.ones(1, 4, 2, 8, dtype=torch.int64)}, TypeError, "v has dtype torch.int64; A"),
        ({"positions": torch.arange(4.0)}, TypeError, "positions has dtype torch.float32; it must"),
        ({"positions": [0, 1, 2, 3]}, TypeError, "positions is a list; it must be a tensor"),
        ({"positions": torch.arange(4)[None]}, ValueError, r"positions has shape \(1, 4\); it mus"),
        ({"positions": torch.arange(4, device="meta")}, ValueError, "positions is on meta and q o"),
        ({"q": [1.0]}, TypeError, "q is a list; it must be a tensor"),
        ({"head_range": (7, 8)}, ValueError, r"head_range is \(7, 8\) and there are 2 heads"),
        ({"head_range": (0, 8), "slopes": [1.0, 2.0]}, ValueError, "slopes and head_range are bo"),
        ({"positions": torch.arange(5)}, ValueError, r"positions has shape \(5,\) and q 4 rows"),
        ({"positions": torch.arange(4) - 1}, ValueError, "positions go from -1 to 2; they must li"),
        ({"positions": torch.arange(4) + 2**24 - 3}, ValueError, "16777216; they must lie between"),
        ({"scale": 0}, ValueError, "scale is 0, which would remove the bias too"),
        ({"scale": float("nan")}, ValueError, "scale is nan; it must be finite"),
        ({"slopes": [1.0]}, ValueError, "slopes has 1 entries and q 2 heads; give one per head"),
        ({"slopes": {1.0: 2, 2.0: 3}}, TypeError, r"slopes is \{.*\}; it must be a list"),
        ({"slopes": [1.0, math.inf]}, ValueError, "slopes holds a number that is not finite"),
    ],
)  # fmt: skip
def test_mistakes(change, error, message):
    q, k, v = torch.randn(3, 1, 4, 2, 8).unbind()
    with pytest.raises(error, match=message):
        with_alibi(**{"q": q, "k": k, "v": v, "positions": torch.arange(4), **change})


def test_what_float16_cannot_hold_is_refused():
    q, k, v = torch.randn(3, 1, 4, 8, 16).half().unbind()
    with pytest.raises(ValueError, match=r"scale is 0\.001; torch.float16 .* at least 0\.00391"):
        with_alibi(q, k, v, torch.arange(4), scale=0.001)
    q2, k2, _, _ = with_alibi(q, k, v, torch.arange(4) + 2**24 - 4, scale=0.00391)
    assert q2.isfinite().all()
    assert k2.isfinite().all()
    with_alibi(*(x.bfloat16() for x in (q, k, v)), torch.arange(4), scale=0.001)
