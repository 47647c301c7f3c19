"""Tokens along a Hilbert curve: the order, and attention in it."""

import pytest
import torch
from dilated_core import DilatedPattern, dilated_attention
from dilated_sparse import (
    attend_in_order,
    block_sparse_attention,
    hilbert_order,
    hilbert_token_order,
    local_window,
    windowed_dilated_attention,
)
from hypothesis import given, settings
from hypothesis import strategies as st

PATTERN = DilatedPattern([8, 32], [1, 4])


def grid_of(height: int, width: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(height), torch.arange(width))


@settings(deadline=None)
@given(height=st.integers(1, 20), width=st.integers(1, 20))
def test_of_all_cells_it_is_the_order_of_the_grid(height: int, width: int) -> None:
    order = hilbert_token_order(grid_of(height, width))
    assert torch.equal(order, hilbert_order(height, width))
    assert torch.equal(order[order.argsort()], torch.arange(height * width))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 16), (4, 64), (64, 16)])
def test_successive_tokens_are_neighbours_on_grids_of_powers_of_two(
    height: int, width: int
) -> None:
    cells = grid_of(height, width)
    steps = cells[hilbert_token_order(cells)].diff(dim=0).abs().sum(1)
    assert (steps == 1).all()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 90)), max_size=60))
def test_some_tokens_in_any_order_and_several_of_one_cell(cells: list[tuple[int, int]]) -> None:
    coordinates = torch.tensor(cells, dtype=torch.int64).view(-1, 2)
    order = hilbert_token_order(coordinates, grid=(31, 91))
    place = hilbert_order(31, 91).argsort()
    wanted = sorted(range(len(cells)), key=lambda i: (place[cells[i][0] * 91 + cells[i][1]], i))
    assert order.tolist() == wanted  # ties keep the order of the input


def test_a_batch_with_padding_is_as_its_sequences_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, most = (7, 1, 12, 0), 12
    coordinates = torch.randint(50, (4, most, 2), generator=generator)
    mask = torch.arange(most) >= torch.tensor(lengths)[:, None]
    mask[0] = mask[0].roll(3)  # padding need not be at the end
    coordinates[mask] = -7  # padding may hold anything
    orders = hilbert_token_order(coordinates, padding_mask=mask)
    for order, cells, padded, n in zip(orders, coordinates, mask, lengths, strict=True):
        real = (~padded).nonzero().flatten()
        assert torch.equal(order[:n], real[hilbert_token_order(cells[~padded])])
        assert torch.equal(order[n:], padded.nonzero().flatten())
        assert torch.equal(order.sort().values, torch.arange(most))


def test_a_segment_holds_more_neighbours_than_row_by_row() -> None:
    def neighbours_inside(order: torch.Tensor) -> float:
        segment = order.argsort().view(32, 32) // 64
        return float((segment[1:] == segment[:-1]).double().mean())

    assert neighbours_inside(hilbert_order(32, 32)) > 0.85
    assert neighbours_inside(torch.arange(32 * 32)) < 0.55


@pytest.mark.parametrize("attend", [dilated_attention, windowed_dilated_attention])
def test_attention_in_an_order_is_that_of_tokens_put_in_order(attend) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = tensors = [
        torch.randn(2, 40, 4, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(3)
    ]
    options = {"pattern": PATTERN} | ({} if attend is dilated_attention else {"window": 5})
    orders = torch.stack([torch.randperm(40, generator=generator) for _ in range(2)])
    mask = torch.rand(2, 40, generator=generator) < 0.3
    out = attend_in_order(attend, q, k, v, orders, key_padding_mask=mask, **options)
    for b, order in enumerate(orders):
        moved = attend(
            *(x[b, order][None] for x in tensors), key_padding_mask=mask[b, order][None], **options
        )
        torch.testing.assert_close(out[b, order], moved[0])
    one = attend_in_order(attend, q, k, v, orders[0], **options)
    torch.testing.assert_close(
        one, attend_in_order(attend, q, k, v, orders[:1].expand(2, -1), **options)
    )
    assert all(x.abs().sum() > 0 for x in torch.autograd.grad(out.sum(), tensors))


def test_causal_attention_sees_what_comes_before_in_the_order() -> None:
    order = hilbert_order(6, 7)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 42, 4, 8, generator=generator, dtype=torch.float64).unbind()
    options = {"pattern": PATTERN, "is_causal": True}
    before = attend_in_order(dilated_attention, q, k, v, order, **options)
    late = order[20:]
    later = [x.index_add(1, late, torch.ones(1, len(late), 4, 8).double()) for x in (q, k, v)]
    after = attend_in_order(dilated_attention, *later, order, **options)
    assert torch.equal(before[:, order[:20]], after[:, order[:20]])
    assert not torch.equal(before[:, late], after[:, late])


def test_dense_attention_does_not_depend_on_the_order() -> None:
    q, k, v = torch.randn(3, 1, 36, 2, 8, dtype=torch.float64).unbind()
    dense = {"pattern": DilatedPattern([36], [1])}
    torch.testing.assert_close(
        attend_in_order(dilated_attention, q, k, v, hilbert_order(6, 6), **dense),
        dilated_attention(q, k, v, **dense),
    )
    blocks = {"pattern": local_window(9, window=1), "block_size": 4}
    moved = attend_in_order(block_sparse_attention, q, k, v, hilbert_order(6, 6), **blocks)
    assert not torch.allclose(moved, block_sparse_attention(q, k, v, **blocks))


@pytest.mark.parametrize(
    ("error", "message", "coordinates", "options"),
    [
        (TypeError, r"dtype torch\.float32; they must be integers", torch.zeros(3, 2), {}),
        (ValueError, r"shape \(3,\); it must be \(N, 2\)", torch.zeros(3).long(), {}),
        (ValueError, "a coordinate is -1", -torch.ones(1, 2).long(), {}),
        (ValueError, "as far as row 5", torch.tensor([[5, 0]]), {"grid": (5, 5)}),
        (ValueError, "height of the grid is 0", torch.tensor([[5, 0]]), {"grid": (0, 5)}),
        (
            TypeError,
            "padding_mask has dtype",
            torch.zeros(3, 2).long(),
            {"padding_mask": torch.zeros(3)},
        ),
        (
            ValueError,
            "padding_mask has shape",
            torch.zeros(3, 2).long(),
            {"padding_mask": torch.zeros(2).bool()},
        ),
    ],
)
def test_wrong_coordinates_are_refused(error, message, coordinates, options) -> None:
    with pytest.raises(error, match=message):
        hilbert_token_order(coordinates, **options)


@pytest.mark.parametrize(
    ("error", "message", "order"),
    [
        (TypeError, r"order has dtype torch\.int32", torch.arange(5).int()),
        (ValueError, r"order has shape \(4,\)", torch.arange(4)),
        (ValueError, "order is no permutation", torch.tensor([0, 1, 2, 2, 4])),
    ],
)
def test_wrong_orders_are_refused(error, message: str, order: torch.Tensor) -> None:
    q = torch.randn(1, 5, 2, 4)
    with pytest.raises(error, match=message):
        attend_in_order(dilated_attention, q, q, q, order, pattern=PATTERN)
