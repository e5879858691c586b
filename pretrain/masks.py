"""Masks on a g×g grid: 1 keeps the image itself, 0 takes its partner (MixMask, section 3.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_BLOCK_CELLS = 4
MIN_ASPECT = 0.3
ATTEMPTS = 10
REDRAWS = 100


def block_cells(grid: int, ratio: float, generator: torch.Generator) -> Tensor:
    """A block mask by the algorithm of BEiT (arXiv:2106.08254, algorithm 1), as the MixMask paper prescribes.

    Rectangles are set one after another: area uniform between 4 cells and what is still to set, aspect log-uniform in
    [0.3, 1/0.3], both sides shorter than the grid, at a uniform place, up to 10 attempts each, until ``round(ratio · g²)``
    cells are set or no attempt fits. A rectangle may overlap earlier ones but never sets more than is still to set.

    On tiny grids the algorithm can end with nothing set; then it is run again, so a mask is never all 0 or all 1. Where
    it can set nothing at all (3 of 2×2 cells: a rectangle of about 3 cells never fits), the complement of the mask for
    ``1 - ratio`` is taken.

    Args:
        grid: Cells per side, at least 2.
        ratio: Nominal share of cells to set, in (0, 1).
        generator: Where the draws come from.

    Returns:
        (grid, grid) bool, True where the image itself is kept.
    """
    goal = min(max(round(ratio * grid * grid), 1), grid * grid - 1)
    for _ in range(REDRAWS):
        cells = torch.zeros(grid, grid, dtype=torch.bool)
        missing = goal
        while missing > 0:
            added = _add_block(cells, missing, generator)
            if added == 0:
                break
            missing -= added
        if cells.any():
            return cells
    return ~block_cells(grid, 1 - ratio, generator)


def _add_block(cells: Tensor, missing: int, generator: torch.Generator) -> int:
    """Set one rectangle in place; returns how many new cells it set, 0 if no attempt fitted."""
    grid = len(cells)
    low, high = math.log(MIN_ASPECT), -math.log(MIN_ASPECT)
    for _ in range(ATTEMPTS):
        u_area, u_aspect, u_top, u_left = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area = MIN_BLOCK_CELLS + (missing - MIN_BLOCK_CELLS) * u_area  # also when missing < 4, as in the reference
        aspect = math.exp(low + (high - low) * u_aspect)
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= grid or width >= grid:
            continue
        top, left = int(u_top * (grid - height + 1)), int(u_left * (grid - width + 1))
        block = cells[top : top + height, left : left + width]
        new = height * width - int(block.sum())
        if 0 < new <= missing:
            block.fill_(True)
            return new
    return 0


def to_pixels(cells: Tensor, height: int, width: int) -> tuple[Tensor, float]:
    """Scale a grid up by nearest neighbour.

    Args:
        cells: (g, g) bool.
        height: Image height in pixels, at least g.
        width: Image width in pixels, at least g.

    Returns:
        (height, width) bool, and λ: the share of pixels that are True (equation 3), from the pixels themselves.
    """
    grid = len(cells)
    rows = torch.arange(height) * grid // height
    columns = torch.arange(width) * grid // width
    pixels = cells[rows][:, columns]
    return pixels, float(pixels.double().mean())
