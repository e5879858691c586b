from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.randomness import generator
from pretrain.masks import block_cells, to_pixels


def reference_block_mask(grid: int, goal: int, rng: random.Random) -> list[list[int]]:
    """BEiT's algorithm 1 written from its text, with the standard library only."""
    mask = [[0] * grid for _ in range(grid)]
    count = 0
    while count < goal:
        placed = 0
        for _ in range(10):
            area = rng.uniform(4, goal - count)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            height = round(math.sqrt(area * aspect))
            width = round(math.sqrt(area / aspect))
            if height >= grid or width >= grid:
                continue
            top, left = rng.randint(0, grid - height), rng.randint(0, grid - width)
            cells = [(y, x) for y in range(top, top + height) for x in range(left, left + width) if not mask[y][x]]
            if 0 < len(cells) <= goal - count:
                for y, x in cells:
                    mask[y][x] = 1
                placed = len(cells)
                break
        if placed == 0:
            break
        count += placed
    return mask


@settings(max_examples=200, deadline=None)
@given(grid=st.integers(2, 16), ratio=st.floats(0.05, 0.95), seed=st.integers(0, 2**32))
def test_never_degenerate_and_never_more_than_asked(grid: int, ratio: float, seed: int) -> None:
    cells = block_cells(grid, ratio, generator(seed))
    assert cells.shape == (grid, grid)
    assert 0 < int(cells.sum()) < grid * grid
    assert int(cells.sum()) <= max(round(ratio * grid * grid), 1)


@pytest.mark.parametrize("grid", [2, 4, 8])
def test_cell_counts_follow_the_reference_in_distribution(grid: int) -> None:
    goal = round(0.5 * grid * grid)
    rng = random.Random(0)
    num = 3000
    reference = []
    while len(reference) < num:  # an empty mask is drawn again here, as in the product
        count = sum(map(sum, reference_block_mask(grid, goal, rng)))
        if count:
            reference.append(count)
    draws = generator(0, "test")
    ours = [int(block_cells(grid, 0.5, draws).sum()) for _ in range(num)]
    # Two-sample chi-square over the counts; the seeds are fixed, the bound is the 99.9 % quantile (Wilson-Hilferty).
    statistic, freedom = 0.0, -1
    for value in range(1, grid * grid):
        a, b = reference.count(value), ours.count(value)
        if a + b >= 10:
            statistic += (a - b) ** 2 / (a + b)
            freedom += 1
    freedom = max(freedom, 1)
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < bound


def test_place_is_uniform_on_the_whole() -> None:
    draws = generator(3, "test")
    share = torch.stack([block_cells(8, 0.5, draws).double() for _ in range(3000)]).mean(0)
    for flipped in (share.flip(0), share.flip(1), share.T):
        assert (share - flipped).abs().max() < 0.06


@settings(max_examples=50, deadline=None)
@given(grid=st.integers(2, 7), height=st.integers(7, 30), width=st.integers(7, 30), seed=st.integers(0, 1000))
def test_pixels_and_lambda_against_a_loop(grid: int, height: int, width: int, seed: int) -> None:
    cells = block_cells(grid, 0.5, generator(seed))
    pixels, own = to_pixels(cells, height, width)
    count = 0
    for y in range(height):
        for x in range(width):
            expected = bool(cells[y * grid // height, x * grid // width])
            assert bool(pixels[y, x]) == expected
            count += expected
    assert own == pytest.approx(count / (height * width), abs=1e-12)
