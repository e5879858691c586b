"""Masks on a g×g grid: 1 keeps the image itself, 0 is masked (MixMask, section 3.1; MSCN, arXiv:2206.07700, section 3).

Masks are drawn with `random.Random`: a batch may need a mask per sample, and plain Python draws one in microseconds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from mixmask.engine.late import torch

if TYPE_CHECKING:
    from torch import Tensor

# The defaults of BEiT's MaskingGenerator: cells and aspect ratio of a rectangle, attempts per rectangle.
MIN_BLOCK_CELLS = 4
MIN_ASPECT = 0.3
ATTEMPTS = 10
REDRAWS = 100  # runs of the algorithm that may set nothing before the complement is drawn instead

Cells = list[list[bool]]


def goal_cells(grid: int, ratio: float) -> int:
    """Number of cells to set: ``round(ratio · g²)``, but at least one and never all of them."""
    return min(max(round(ratio * grid * grid), 1), grid * grid - 1)


def block_cells(grid: int, ratio: float, rng: random.Random, exact: bool = False) -> Cells:
    """A block mask by the algorithm of BEiT (arXiv:2106.08254, algorithm 1), as the MixMask paper prescribes.

    Rectangles are placed one after another until ``round(ratio · g²)`` cells are set, or until none of 10 attempts at a
    rectangle fits. An attempt draws the area uniformly between 4 and the number of missing cells, the aspect ratio
    log-uniformly in [0.3, 1/0.3], and the position uniformly. Both sides must be shorter than the grid. A rectangle may
    overlap earlier ones, but must not set more cells than are missing.

    On tiny grids the algorithm can end without a cell set. It is then run again, so a mask is never all 0 or all 1.
    Where it can set nothing at all (3 of 2×2 cells: a rectangle of about 3 cells never fits), the complement of a mask
    for ``1 - ratio`` is used.

    Args:
        grid: Cells per side, at least 2.
        ratio: Nominal share of cells to set, in [0, 1]; 0 sets one cell, 1 all but one.
        rng: Source of all draws.
        exact: Grow or shrink the set area at its border until exactly ``round(ratio · g²)`` cells are set.

    Returns:
        grid rows of grid cells, True where the image itself is kept.
    """
    goal = goal_cells(grid, ratio)
    cells = _blocks(grid, goal, rng)
    if cells is None:
        cells = _blocks(grid, grid * grid - goal, rng)
        assert cells is not None
        cells = [[not cell for cell in row] for row in cells]
    if exact:
        _adjust(cells, goal, rng)
    return cells


def _blocks(grid: int, goal: int, rng: random.Random) -> Cells | None:
    for _ in range(REDRAWS):
        cells = [[False] * grid for _ in range(grid)]
        missing = goal
        while missing > 0:
            added = _add_block(cells, missing, rng)
            if added == 0:
                break
            missing -= added
        # As in BEiT, fewer cells than the goal are enough; only an empty mask is drawn again.
        if missing < goal:
            return cells
    return None


def _add_block(cells: Cells, missing: int, rng: random.Random) -> int:
    """Set one rectangle in place and return the number of newly set cells, 0 if no attempt fits."""
    grid = len(cells)
    low, high = math.log(MIN_ASPECT), -math.log(MIN_ASPECT)
    for _ in range(ATTEMPTS):
        area = rng.uniform(MIN_BLOCK_CELLS, missing)  # also when fewer than 4 are missing, as in the reference
        aspect = math.exp(rng.uniform(low, high))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= grid or width >= grid:
            continue
        top, left = rng.randrange(grid - height + 1), rng.randrange(grid - width + 1)
        block = [(y, x) for y in range(top, top + height) for x in range(left, left + width) if not cells[y][x]]
        if 0 < len(block) <= missing:
            for y, x in block:
                cells[y][x] = True
            return len(block)
    return 0


def _adjust(cells: Cells, goal: int, rng: random.Random) -> None:
    """Set or clear random cells at the border of the set area, one by one, until ``goal`` cells are set."""
    grid = len(cells)
    missing = goal - sum(map(sum, cells))
    for _ in range(abs(missing)):
        wrong = missing < 0  # the kind of the cells that change
        border = [
            (y, x)
            for y in range(grid)
            for x in range(grid)
            if cells[y][x] == wrong
            and any(
                0 <= y + dy < grid and 0 <= x + dx < grid and cells[y + dy][x + dx] != wrong
                for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))
            )
        ]
        y, x = rng.choice(border)
        cells[y][x] = not wrong


def discrete_cells(grid: int, ratio: float, rng: random.Random, exact: bool = False) -> Cells:
    """Set each cell independently with probability ``ratio``; arguments as `block_cells`.

    The mask is drawn again while all cells are equal.
    """
    if exact:
        chosen = set(rng.sample(range(grid * grid), goal_cells(grid, ratio)))
        return [[y * grid + x in chosen for x in range(grid)] for y in range(grid)]
    probability = min(max(ratio, 1 / grid**2), 1 - 1 / grid**2)  # 0 and 1 would never end the loop
    while True:
        cells = [[rng.random() < probability for _ in range(grid)] for _ in range(grid)]
        if 0 < sum(map(sum, cells)) < grid * grid:
            return cells


def focal_cells(grid: int, ratio: float, rng: random.Random, exact: bool = False) -> Cells:
    """Keep one rectangle of about ``ratio · g²`` cells, aspect log-uniform in [0.3, 1/0.3], at a uniform position.

    ``exact`` grows or shrinks it at its border to exactly ``round(ratio · g²)`` cells.
    """
    goal = goal_cells(grid, ratio)
    aspect = math.exp(rng.uniform(math.log(MIN_ASPECT), -math.log(MIN_ASPECT)))
    height = min(max(round(math.sqrt(goal * aspect)), 1), grid)
    width = min(max(round(goal / height), 1), grid)
    # A mask must hide at least one cell.
    if height == width == grid:
        width -= 1
    top, left = rng.randrange(grid - height + 1), rng.randrange(grid - width + 1)
    cells = [[top <= y < top + height and left <= x < left + width for x in range(grid)] for y in range(grid)]
    if exact:
        _adjust(cells, goal, rng)
    return cells


PATTERNS: dict[str, Callable[[int, float, random.Random, bool], Cells]] = {
    "block": block_cells,
    "discrete": discrete_cells,
    "random": discrete_cells,  # MSCN's name for it
    "focal": focal_cells,
}


def to_pixels(cells: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Scale grids up by nearest neighbour.

    Args:
        cells: (…, g, g) bool.
        height: Image height in pixels, at least g.
        width: Image width in pixels, at least g.

    Returns:
        (…, height, width) bool, and (…) λ: the share of True pixels (equation 3). Pixels are counted, because cells
        differ in size where g does not divide the image.
    """
    grid = cells.shape[-1]
    rows = torch.arange(height) * grid // height
    columns = torch.arange(width) * grid // width
    pixels = cells[..., rows, :][..., columns]
    return pixels, pixels.double().mean(dim=(-2, -1)).float()
