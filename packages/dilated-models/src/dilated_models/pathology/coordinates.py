"""Coordinates for a recipe, and a report of what they look like."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dilated_models.pathology.features import SlideFeatures
from dilated_models.slide.config import DEFAULT_TILE_SIZE
from dilated_models.slide.recipes import Recipe


@dataclass(frozen=True)
class Placement:
    """Where the tiles of a slide lie.

    Attributes:
        coords: int64 `(L, 2)`.
        tile_size: Side of a grid cell, in the pixels of `coords`.
    """

    coords: NDArray[np.int64]
    tile_size: int


def place(slide: SlideFeatures, recipe: Recipe, *, tile_size: int | None = None) -> Placement:
    """Coordinates and cell size of a slide, as the recipe's program gives them to the encoder.

    Args:
        slide: The slide.
        recipe: Tells which coordinates.
        tile_size: Side of a cell, in the pixels of the coordinates; None: as in the recipe.

    Raises:
        ValueError: If the recipe needs an attribute that the file lacks.
    """
    if recipe.coordinates == "rescaled":
        if slide.scale is None:
            raise ValueError(
                f"the slide {slide.name!r} does not tell its scale, which this recipe multiplies "
                f"coordinates by; its coords must have the attributes patch_size and "
                f"patch_size_level0, so write them, or use a recipe that takes coordinates as they "
                f"are."
            )
        coords = np.floor(slide.coords.astype(np.float32) * np.float32(slide.scale))
        return Placement(coords.astype(np.int64), tile_size or DEFAULT_TILE_SIZE)
    if tile_size is not None:
        return Placement(slide.coords, tile_size)
    if recipe.coordinates == "level0_tile":
        if slide.level0_tile is None:
            raise ValueError(
                f"the slide {slide.name!r} does not tell the side of its tiles on level 0, which "
                f"this recipe takes as the side of a grid cell; give it as tile_size, or write the "
                f"attribute patch_size_level0 of coords."
            )
        return Placement(slide.coords, slide.level0_tile)
    return Placement(slide.coords, DEFAULT_TILE_SIZE)


@dataclass(frozen=True)
class CoordinateReport:
    """What the coordinates of a slide look like on the encoder's grid.

    Attributes:
        tiles: L.
        tile_size: Side of a grid cell, in pixels.
        stride: Most frequent distance of neighbouring columns and rows of tiles, in pixels; None if
            there is one of each.
        level: What the file tells about magnification or downsampling; "" if nothing.
        columns, rows: Extent in grid cells.
        shared: Share of the tiles that lie in a cell with another tile.
        fullest: Largest number of tiles in one cell.
        outside: Number of tiles outside the grid.
    """

    tiles: int
    tile_size: int
    stride: int | None
    level: str
    columns: int
    rows: int
    shared: float
    fullest: int
    outside: int

    def lines(self) -> list[str]:
        """The report as text, its findings first."""
        stride = "one tile" if self.stride is None else f"a stride of {self.stride} pixels"
        level = f", {self.level}" if self.level else ""
        lines = [
            f"{self.tiles:,} tiles in {self.columns} × {self.rows} cells of {self.tile_size} "
            f"pixels, {stride}{level}"
        ]
        if self.outside:
            lines.append(f"{self.outside:,} tiles lie outside the grid")
        if self.shared:
            lines.append(
                f"{self.shared:.0%} of the tiles share a cell with another one, up to "
                f"{self.fullest} in one: they get equal positions"
            )
        if self.stride is not None and self.stride != self.tile_size:
            lines.append(
                f"tiles are {self.stride} pixels apart and cells {self.tile_size} wide: are "
                f"coordinates on another level than tile_size counts?"
            )
        return lines


def report_coordinates(
    slide: SlideFeatures, placement: Placement, *, slide_ngrids: int
) -> CoordinateReport:
    """Describe where the tiles of a slide lie on the grid.

    Args:
        slide: The slide.
        placement: Its coordinates and cells.
        slide_ngrids: Cells per side of the grid.
    """
    cells = placement.coords // placement.tile_size
    _, counts = np.unique(cells, axis=0, return_counts=True)
    extent = cells.max(axis=0) - cells.min(axis=0) + 1
    return CoordinateReport(
        tiles=len(cells),
        tile_size=placement.tile_size,
        stride=_stride(placement.coords),
        level=_level(slide),
        columns=int(extent[0]),
        rows=int(extent[1]),
        shared=float(counts[counts > 1].sum() / len(cells)),
        fullest=int(counts.max()),
        outside=int(((cells < 0) | (cells >= slide_ngrids)).any(axis=1).sum()),
    )


def _stride(coords: NDArray[np.int64]) -> int | None:
    steps = np.concatenate([np.diff(np.unique(coords[:, axis])) for axis in (0, 1)])
    if not len(steps):
        return None
    sizes, counts = np.unique(steps, return_counts=True)
    return int(sizes[counts.argmax()])


def _level(slide: SlideFeatures) -> str:
    target, source = slide.number("target_magnification"), slide.number("level0_magnification")
    if target is not None and source is not None:
        return f"tiles at {target:g}×, level 0 at {source:g}×"
    level = slide.attributes.get("patch_level")
    return "" if level is None else f"tiles of level {level}"
