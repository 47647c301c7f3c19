"""The order visits every cell once and keeps neighbours together."""

import pytest
import torch
from dilated_core.pattern.hilbert import hilbert_index, hilbert_order
from hypothesis import given
from hypothesis import strategies as st


@given(height=st.integers(0, 40), width=st.integers(0, 40))
def test_every_cell_once(height, width):
    order = hilbert_order(height, width)
    assert torch.equal(order.sort().values, torch.arange(height * width))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 8), (2, 6), (4, 64), (64, 16), (32, 1)])
def test_steps_lead_to_a_neighbour(height, width):
    order = hilbert_order(height, width)
    rows, columns = order // width, order % width
    assert order[0] == 0
    assert (rows.diff().abs() + columns.diff().abs() == 1).all()


def test_parts_of_the_curve_are_compact():
    """What makes it worth having: 64 successive cells lie in an 8 × 8 square, not in one row."""
    order = hilbert_order(32, 32).view(-1, 64)
    for cells in (order // 32, order % 32):
        assert (cells.amax(1) - cells.amin(1) == 7).all()


def test_what_is_no_side_is_refused():
    with pytest.raises(ValueError, match="width is -1; it must be at least 0"):
        hilbert_order(3, -1)
    with pytest.raises(TypeError, match=r"height is 3\.0; it must be an integer"):
        hilbert_order(3.0, 1)


def test_the_order_is_on_the_cpu_whatever_the_default_device():
    torch.set_default_device("meta")
    try:
        orders = hilbert_order(3, 5), hilbert_order(0, 5)
    finally:
        torch.set_default_device(None)
    assert torch.equal(orders[0], hilbert_order(3, 5))
    assert orders[1].device.type == "cpu"


@given(height=st.integers(1, 40), width=st.integers(1, 40), data=st.data())
def test_some_cells_have_the_order_that_they_have_among_all(height, width, data):
    order = hilbert_order(height, width)
    chosen = data.draw(st.lists(st.integers(0, height * width - 1), unique=True))
    cells = torch.tensor(chosen, dtype=torch.int64)
    index = hilbert_index(cells // width, cells % width, height, width)
    wanted = [cell for cell in order.tolist() if cell in set(chosen)]
    assert cells[index.argsort()].tolist() == wanted


def test_a_grid_as_large_as_int64_allows():
    corners = torch.tensor([0, 2**31 - 1])
    index = hilbert_index(torch.zeros(2, dtype=torch.int64), corners, 2**31, 2**31)
    assert index.tolist() == [0, 2**62 - 1]
