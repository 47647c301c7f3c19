"""Attention over ranks equals the oracle of the whole sequence, forward and backward."""

import pytest
import torch
from dilated_core import DilatedPattern, dilated_attention
from dilated_core.reference import reference_dilated_attention
from dilated_core.testing.cases import AWKWARD_CASES, Case, random_cases
from dilated_ring import simulated_ring_attention
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

EXCHANGES = ["ring", "all_gather", "all_to_all", "auto"]
LAYOUTS = ["contiguous", "zigzag"]

TOLERANCE = 1e-9
"""float64 rounds sums of this size by 1e-13; a wrong or missing row is off by 1e-3 and more."""


def compare(case: Case, ring_size: int, layout: str, exchange: str, backend: str = "eager") -> None:
    q, k, v, dout = case.tensors(dtype=torch.float64)
    options = case.options()
    if exchange == "all_to_all" and (case.num_kv_heads or case.num_heads) < ring_size:
        exchange = "auto"  # which must not choose what has too few heads
    # A gradient that is no contiguous tensor.
    dout = dout.transpose(-1, -2).contiguous().transpose(-1, -2)
    exact = reference_dilated_attention(q, k, v, case.pattern, **options)
    want = torch.autograd.grad(exact, (q, k, v), dout)
    out = simulated_ring_attention(
        q, k, v, case.pattern, ring_size=ring_size, layout=layout, exchange=exchange,
        backend=backend, **options,
    )  # fmt: skip
    got = torch.autograd.grad(out, (q, k, v), dout)
    for a, b in zip((out, *got), (exact, *want), strict=True):
        assert (a - b).abs().max() < TOLERANCE


@pytest.mark.parametrize("case", AWKWARD_CASES, ids=lambda case: case.name)
def test_awkward_cases(case: Case) -> None:
    number = AWKWARD_CASES.index(case)
    # Each layout and exchange meets every shape of trouble; the product of all is a sweep.
    compare(case, 2 + number % 3, LAYOUTS[number % 2], EXCHANGES[number // 2 % 4])
    compare(case, 8 - number % 4, LAYOUTS[1 - number % 2], EXCHANGES[(number + 1) % 4])


@pytest.mark.exhaustive
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", AWKWARD_CASES, ids=lambda case: case.name)
def test_all_awkward_cases(case: Case, layout: str, exchange: str) -> None:
    for ring_size in (1, 2, 3, 4, 8):
        compare(case, ring_size, layout, exchange)


ATTENDED = Case(
    seq_len=41, num_heads=5, pattern=DilatedPattern([10, 41], [3, 4], padding="attended")
)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.differing_executors])
@given(
    case=random_cases(with_options=True),
    ring_size=st.integers(1, 9),
    layout=st.sampled_from(LAYOUTS),
    exchange=st.sampled_from(EXCHANGES),
    backend=st.sampled_from(["eager", "sdpa"]),
    fewest_rows=st.sampled_from([1, 4096]),
)
# Zero keys that come with a part of which a head keeps nothing.
@example(ATTENDED, 8, "zigzag", "ring", "eager", 4096)
def test_random_cases(
    case: Case, ring_size: int, layout: str, exchange: str, backend: str, fewest_rows: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # Problems are cut into parts as those of long sequences are.
        patch.setattr("dilated_ring.plan.parts._FEWEST_ROWS", fewest_rows)
        compare(case, ring_size, layout, exchange, backend)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_some_of_the_heads(exchange: str) -> None:
    """Heads 4 to 9 of 12, with the offsets that they have among the 12."""
    pattern = DilatedPattern([10, 24, 60], [1, 4, 8], head_offsets="blocked")
    case = Case(seq_len=60, num_heads=12, num_kv_heads=6, pattern=pattern, is_causal=True)
    q, k, v, _ = case.tensors(dtype=torch.float64)
    whole = dilated_attention(q, k, v, pattern, is_causal=True)
    for layout in LAYOUTS:
        some = simulated_ring_attention(
            q[:, :, 4:10], k[:, :, 2:5], v[:, :, 2:5], pattern, ring_size=3, is_causal=True,
            head_range=(4, 12), exchange=exchange, layout=layout,
        )  # fmt: skip
        assert (some - whole[:, :, 4:10]).abs().max() < 1e-12


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_nothing_to_attend_to(exchange: str) -> None:
    """Results and gradients are empty, and every gradient is there."""
    pattern = DilatedPattern([4, 10], [1, 2])
    for shape, options in (
        ((0, 10, 4, 8), {}),
        ((2, 0, 4, 8), {}),
        ((0, 4, 8), {"cu_seqlens": torch.tensor([0, 0])}),
    ):
        q, k, v = (torch.zeros(shape, requires_grad=True) for _ in range(3))
        out = simulated_ring_attention(q, k, v, pattern, ring_size=3, exchange=exchange, **options)
        assert out.shape == shape
        for grad in torch.autograd.grad(out.sum(), (q, k, v)):
            assert grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_of_half_precision_does_not_grow_with_the_ring(dtype: torch.dtype) -> None:
    """One rounding at the end, not one per hop."""
    pattern = DilatedPattern([64, 256, 1024], [1, 2, 4])
    case = Case(seq_len=1024, num_heads=4, head_dim=16, pattern=pattern, is_causal=True)
    q, k, v, dout = case.tensors(dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = reference_dilated_attention(*wide, pattern, is_causal=True)
    want = torch.autograd.grad(exact, wide, dout.double())
    errors: list[list[float]] = []
    for ring_size in (1, 8):
        out = simulated_ring_attention(
            q, k, v, pattern, ring_size=ring_size, is_causal=True, exchange="ring", backend="sdpa"
        )
        got = torch.autograd.grad(out, (q, k, v), dout)
        pairs = [(out.detach(), exact.detach()), *zip(got, want, strict=True)]
        errors.append([float((a.double() - b).norm() / b.norm()) for a, b in pairs])
    for one, many in zip(*errors, strict=True):
        assert many <= 1.2 * one


def test_a_second_derivative_is_refused() -> None:
    q, k, v, _ = Case(seq_len=20, pattern=DilatedPattern([20], [1])).tensors(dtype=torch.float64)
    out = simulated_ring_attention(q, k, v, DilatedPattern([20], [1]), ring_size=2, exchange="ring")
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


BAD = [
    ({"ring_size": 0}, ValueError, "ring_size is 0"),
    ({"ring_size": 2.5}, TypeError, "ring_size is 2.5"),
    ({"layout": "striped"}, ValueError, "layout is 'striped'; it must be one of 'contiguous'"),
    ({"exchange": "p2p"}, ValueError, "exchange is 'p2p'"),
    ({"is_causal": "False"}, TypeError, "is_causal"),
    ({"backend": "fast"}, ValueError, "backend is 'fast'"),
    ({"head_range": (3, 4)}, ValueError, "head_range"),
    ({"exchange": "all_to_all", "ring_size": 5}, ValueError, "k and v have 4 heads"),
    ({"key_padding_mask": torch.zeros(1, 3, dtype=torch.bool)}, ValueError, "key_padding_mask"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_arguments(options: dict, error: type[Exception], message: str) -> None:
    pattern = DilatedPattern([20], [1])
    q, k, v, _ = Case(seq_len=20, pattern=pattern).tensors(dtype=torch.float32)
    with pytest.raises(error, match=message):
        simulated_ring_attention(q, k, v, pattern, **({"ring_size": 2} | options))


# PyTorch itself, where a graph goes on with a result of the function.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_function_breaks_its_graph_here() -> None:
    pattern = DilatedPattern([8, 20], [1, 2])
    q, k, v, dout = Case(seq_len=20, pattern=pattern).tensors(dtype=torch.float64)

    def function(q: torch.Tensor) -> torch.Tensor:
        return simulated_ring_attention(q * 2, k, v, pattern, ring_size=2).sin()

    compiled = torch.compile(function, backend="aot_eager")
    want, got = (torch.autograd.grad(f(q), q, dout)[0] for f in (function, compiled))
    torch.testing.assert_close(got, want)


def test_autocast_casts_no_integers() -> None:
    x = torch.ones(1, 8, 2, 4, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="have dtype"):
        simulated_ring_attention(x, x, x, DilatedPattern([8], [1]), ring_size=2)
