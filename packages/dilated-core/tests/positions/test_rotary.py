"""xPos and RoPE: what turns, what decays, and that only distances matter."""

import math

import pytest
import torch
from dilated_core.positions.rotary import check_decay_range, rotate, rotation_at

HEAD_DIM = 16


def scores(positions: torch.Tensor, *, scale_base: float | None, center: int = 0) -> torch.Tensor:
    """Dot products of one query and one key vector placed at every pair of positions."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, HEAD_DIM, generator=generator, dtype=torch.float64)
    rotation = rotation_at(
        positions, HEAD_DIM, scale_base=scale_base, center=center, dtype=torch.float64
    )
    shape = (1, len(positions), 1, HEAD_DIM)
    q = rotate(q.expand(shape), rotation.q_cos, rotation.q_sin)
    k = rotate(k.expand(shape), rotation.k_cos, rotation.k_sin)
    return torch.einsum("bqhd,bkhd->qk", q, k)


@pytest.mark.parametrize("scale_base", [None, 32.0, 512.0])
def test_scores_depend_only_on_relative_positions(scale_base: float | None) -> None:
    here = scores(torch.arange(50), scale_base=scale_base)
    there = scores(torch.arange(50) + 700, scale_base=scale_base)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-9)
    for distance in (0, 1, 7):
        diagonal = here.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-9)
    # ... and they do depend on the distance.
    assert (here[20, 20] - here[20, 13]).abs() > 1e-3


def test_the_center_cancels() -> None:
    a = scores(torch.arange(50), scale_base=32.0, center=0)
    b = scores(torch.arange(50), scale_base=32.0, center=25)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    # It is where the decay is 1: the factors are those of plain RoPE there, and nowhere else.
    positions = torch.tensor([25, 26])
    decayed = rotation_at(positions, HEAD_DIM, scale_base=32.0, center=25)
    plain = rotation_at(positions, HEAD_DIM, scale_base=None)
    assert torch.equal(decayed.q_cos[0], plain.q_cos[0])
    assert not torch.equal(decayed.q_cos[1], plain.q_cos[1])


def test_a_shard_is_rotated_as_the_whole_is() -> None:
    x = torch.randn(1, 30, 2, HEAD_DIM, dtype=torch.float64)
    whole = rotation_at(torch.arange(30), HEAD_DIM, dtype=torch.float64)
    shard = rotation_at(torch.arange(10, 20), HEAD_DIM, dtype=torch.float64)
    expected = rotate(x, whole.k_cos, whole.k_sin)[:, 10:20]
    torch.testing.assert_close(rotate(x[:, 10:20], shard.k_cos, shard.k_sin), expected)


def test_against_the_formula_written_as_complex_numbers() -> None:
    q = torch.randn(1, 9, 1, HEAD_DIM, dtype=torch.float64)
    rotation = rotation_at(torch.arange(9), HEAD_DIM, scale_base=512.0, dtype=torch.float64)
    n = torch.arange(9, dtype=torch.float64)[:, None]
    i = torch.arange(HEAD_DIM // 2, dtype=torch.float64)
    theta = 10000 ** (-2 * i / HEAD_DIM)
    zeta = (2 * i + 0.4 * HEAD_DIM) / (1.4 * HEAD_DIM)
    factor = torch.polar(zeta ** (n / 512), n * theta)
    expected = torch.view_as_complex(q.unflatten(-1, (-1, 2))) * factor[None, :, None]
    actual = rotate(q, rotation.q_cos, rotation.q_sin)
    torch.testing.assert_close(actual, torch.view_as_real(expected).flatten(-2))


def test_xpos_decays_where_rope_does_not() -> None:
    ones = torch.ones(1, 2, 1, HEAD_DIM, dtype=torch.float64)
    positions = torch.tensor([0, 4096])

    def norm(scale_base: float | None) -> torch.Tensor:
        rotation = rotation_at(positions, HEAD_DIM, scale_base=scale_base, dtype=torch.float64)
        return rotate(ones, rotation.q_cos, rotation.q_sin).norm(dim=-1).flatten()

    torch.testing.assert_close(norm(None), torch.full((2,), 4.0, dtype=torch.float64))
    assert norm(512.0)[1] < 0.5 * norm(512.0)[0]


def test_angles_are_exact_at_a_million_tokens() -> None:
    position = torch.tensor([1_000_001])
    rotation = rotation_at(position, HEAD_DIM, scale_base=None)
    for pair in range(HEAD_DIM // 2):
        angle = 1_000_001 * 10_000 ** (-2 * pair / HEAD_DIM)
        assert rotation.q_cos[0, 0, 2 * pair].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_rotate_keeps_the_dtype() -> None:
    rotation = rotation_at(torch.arange(3), HEAD_DIM)
    x = torch.randn(1, 3, 1, HEAD_DIM, dtype=torch.bfloat16)
    assert rotate(x, rotation.q_cos, rotation.q_sin).dtype == torch.bfloat16


def test_the_range_check_is_where_factors_leave_the_range() -> None:
    check_decay_range(16_384, 512.0, torch.float32)
    with pytest.raises(ValueError, match=r"scale base of \d+ or more, or plain RoPE"):
        check_decay_range(500_000, 512.0, torch.float32)
    with pytest.raises(ValueError, match=r"float16 up to \d+ positions"):
        check_decay_range(16_384, 512.0, torch.float16)
    # What the message proposes passes, and its factors are normal numbers.
    base = 512.0 * 500_000 / 32_000
    check_decay_range(500_000, base, torch.float32)
    rotation = rotation_at(torch.tensor([500_000]), HEAD_DIM, scale_base=base, center=0)
    assert rotation.k_cos.isfinite().all()
    assert (rotation.q_cos.abs() + rotation.q_sin.abs()).min() > torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_positions_of_every_integer_dtype(dtype: torch.dtype) -> None:
    """Before the center too, where an unsigned difference would wrap."""
    positions = torch.arange(100)
    want = rotation_at(positions, HEAD_DIM, scale_base=64.0, center=50)
    for a, b in zip(
        rotation_at(positions.to(dtype), HEAD_DIM, scale_base=64.0, center=50), want, strict=True
    ):
        assert torch.equal(a, b)


def test_far_positions_keep_their_distances() -> None:
    """At 10⁹ tokens a float32 angle would be wrong by a turn."""
    near = scores(torch.arange(4), scale_base=None)
    far = scores(torch.arange(4) + 10**9, scale_base=None)
    torch.testing.assert_close(near, far, rtol=0, atol=1e-5)


def test_tensors_are_made_on_the_device_of_the_data() -> None:
    positions = torch.arange(9)
    want = rotation_at(positions, HEAD_DIM)
    with torch.device("meta"):  # what torch.set_default_device("meta") does
        got = rotation_at(positions, HEAD_DIM)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    shapes = rotation_at(positions.to("meta"), HEAD_DIM)
    assert [x.shape for x in shapes] == [x.shape for x in want]


def test_any_strides_are_rotated() -> None:
    x = torch.randn(2, 30, dtype=torch.float64).unfold(-1, HEAD_DIM, 1)[:, :, None]
    rotation = rotation_at(torch.arange(x.shape[1]), HEAD_DIM, dtype=torch.float64)
    got = rotate(x, rotation.q_cos, rotation.q_sin)
    assert torch.equal(got, rotate(x.contiguous(), rotation.q_cos, rotation.q_sin))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"positions": [1, 2]}, TypeError, "positions is a list; it must be a tensor"),
        ({"positions": torch.ones(3)}, TypeError, "positions has dtype torch.float32; it must be"),
        ({"positions": torch.ones(3) > 0}, TypeError, "positions has dtype torch.bool; it must be"),
        ({"positions": torch.tensor(3)}, ValueError, r"positions has shape \(\); it must have one"),
        ({"head_dim": 7}, ValueError, "head_dim is 7; it must be even"),
        ({"head_dim": 0}, ValueError, "head_dim is 0; it must be at least 2"),
        ({"head_dim": 8.0}, TypeError, r"head_dim is 8\.0; it must be an integer"),
        ({"scale_base": 0}, ValueError, "scale_base is 0; it must be above 0"),
        ({"scale_base": "512"}, TypeError, "scale_base is '512'; it must be a number, or None for"),
        ({"center": 0.5}, TypeError, r"center is 0\.5; it must be an integer"),
        ({"dtype": torch.bfloat16}, TypeError, "dtype is torch.bfloat16; it must be torch.float32"),
    ],
)
def test_mistakes(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rotation_at(**{"positions": torch.arange(3), "head_dim": 8, **change})
