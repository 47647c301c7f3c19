"""Cells of the grid, and their sines and cosines, against the table of the published code."""

import pytest
import torch
from dilated_models.slide.positions import cell_embeddings, check_cells, grid_cells


def published_table(dim: int, ngrids: int) -> torch.Tensor:
    """MAE's table as GigaPath fills it: row x · ngrids + y, first half by column, float64."""
    row, column = torch.meshgrid(torch.arange(ngrids), torch.arange(ngrids), indexing="ij")
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))

    def axis(position):
        angles = position.reshape(-1, 1).double() * omega
        return torch.cat((angles.sin(), angles.cos()), 1)

    return torch.cat((axis(column), axis(row)), 1)


def test_embeddings_are_the_rows_of_the_published_table():
    ngrids, dim = 37, 24
    cells = torch.randint(ngrids, (2, 50, 2), generator=torch.Generator().manual_seed(0))
    rows = published_table(dim, ngrids)[cells[..., 0] * ngrids + cells[..., 1]]
    assert torch.equal(cell_embeddings(cells, ngrids, dim, torch.float64), rows)
    assert torch.equal(cell_embeddings(cells, ngrids, dim, torch.float32), rows.float())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
def test_cells_are_floors(dtype):
    coords = torch.tensor([[0, 255], [256, 511], [512, 254_999]], dtype=dtype)
    assert grid_cells(coords, 256).tolist() == [[0, 0], [1, 1], [2, 996]]
    assert grid_cells(coords, 1000).tolist() == [[0, 0], [0, 0], [0, 254]]


@pytest.mark.parametrize("cell", [[-1, 0], [0, 1000], [1000, 0], [-1, 1000]])
def test_tiles_outside_the_grid_are_refused(cell):
    cells = torch.zeros(10, 2, dtype=torch.int64)
    check_cells(cells, 1000, 256)
    cells[7] = torch.tensor(cell)
    with pytest.raises(ValueError, match=r"1 of 10 tiles lie outside .* give the tile_size"):
        check_cells(cells, 1000, 256)
