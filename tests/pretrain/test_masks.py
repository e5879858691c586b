from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmask.pretrain.masks import PATTERNS, Cells, block_cells, discrete_cells, focal_cells, goal_cells, to_pixels


def reference_block_mask(grid: int, goal: int, rng: random.Random) -> list[list[int]]:
    """BEiT's algorithm 1 written from its text."""
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


def count(cells: Sequence[Sequence[object]]) -> int:
    return sum(bool(cell) for row in cells for cell in row)


def bounding_box(cells: Sequence[Sequence[object]]) -> tuple[int, int]:
    rows = [y for y, row in enumerate(cells) if any(row)]
    columns = [x for x in range(len(cells)) if any(row[x] for row in cells)]
    return rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1


def num_runs(cells: Sequence[Sequence[object]]) -> int:
    """Horizontal runs of set cells: how ragged a mask is."""
    return sum(bool(row[x]) and (x == 0 or not row[x - 1]) for row in cells for x in range(len(row)))


def assert_same_distribution(first: Sequence[Hashable], second: Sequence[Hashable]) -> None:
    """Two-sample chi-square over the values seen often; the bound is the 99.9 % quantile (Wilson-Hilferty)."""
    a, b = Counter(first), Counter(second)
    statistic, freedom = 0.0, -1
    for value in {*a, *b}:
        if a[value] + b[value] >= 20:
            statistic += (a[value] - b[value]) ** 2 / (a[value] + b[value])
            freedom += 1
    freedom = max(freedom, 1)
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < bound


@settings(max_examples=200, deadline=None)
@given(
    pattern=st.sampled_from(sorted(PATTERNS)),
    grid=st.integers(2, 16),
    ratio=st.floats(0, 1),
    exact=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_never_degenerate_and_exact_when_asked(pattern: str, grid: int, ratio: float, exact: bool, seed: int) -> None:
    cells = PATTERNS[pattern](grid, ratio, random.Random(seed), exact)
    assert len(cells) == grid
    assert all(len(row) == grid for row in cells)
    assert 0 < count(cells) < grid * grid
    if exact:
        assert count(cells) == min(max(round(ratio * grid * grid), 1), grid * grid - 1)
    if pattern == "block" and grid > 2:
        assert count(cells) <= goal_cells(grid, ratio)


@pytest.mark.slow
@pytest.mark.parametrize(("grid", "ratio"), [(2, 0.5), (4, 0.5), (8, 0.5), (8, 0.25), (14, 0.4)])
def test_block_masks_follow_the_reference_in_distribution(grid: int, ratio: float) -> None:
    rng = random.Random(0)
    num = 3000
    reference: list[Sequence[Sequence[object]]] = []
    while len(reference) < num:  # an empty mask is drawn again here, as in the product
        mask = reference_block_mask(grid, round(ratio * grid * grid), rng)
        if count(mask):
            reference.append(mask)
    rng = random.Random(1)
    ours = [block_cells(grid, ratio, rng) for _ in range(num)]
    measures: list[Callable[[Sequence[Sequence[object]]], Hashable]] = [count, bounding_box, num_runs]
    for measure in measures:
        assert_same_distribution([measure(mask) for mask in reference], [measure(mask) for mask in ours])
    share = torch.tensor(ours).double().mean(0)
    expected = torch.tensor(reference).double().mean(0)
    assert (share - expected).abs().max() < 5 * math.sqrt(0.25 / num) * math.sqrt(2)


def test_place_is_uniform_on_the_whole() -> None:
    rng = random.Random(3)
    share = torch.tensor([block_cells(8, 0.5, rng) for _ in range(3000)]).double().mean(0)
    for flipped in (share.flip(0), share.flip(1), share.T):
        assert (share - flipped).abs().max() < 0.06


def test_discrete_cells_are_independent_with_the_asked_probability() -> None:
    rng = random.Random(0)
    cells = torch.tensor([discrete_cells(8, 0.3, rng) for _ in range(4000)]).double().flatten(1)
    assert (cells.mean(0) - 0.3).abs().max() < 0.04
    correlation = torch.corrcoef(cells.T) - torch.eye(64)
    assert correlation.abs().max() < 0.08


@settings(max_examples=100, deadline=None)
@given(grid=st.integers(2, 14), ratio=st.floats(0.05, 0.95), seed=st.integers(0, 2**32))
def test_focal_keeps_one_rectangle(grid: int, ratio: float, seed: int) -> None:
    cells = focal_cells(grid, ratio, random.Random(seed))
    height, width = bounding_box(cells)
    assert count(cells) == height * width


def test_block_masks_are_less_ragged_than_discrete_ones() -> None:
    rng = random.Random(0)

    def runs(build: Callable[..., Cells]) -> float:
        return sum(num_runs(build(8, 0.5, rng, True)) for _ in range(500)) / 500

    assert runs(block_cells) < 0.8 * runs(discrete_cells)


@settings(max_examples=50, deadline=None)
@given(grid=st.integers(2, 7), height=st.integers(7, 30), width=st.integers(7, 30), seed=st.integers(0, 1000))
def test_pixels_and_lambda_against_a_loop(grid: int, height: int, width: int, seed: int) -> None:
    cells = torch.tensor([block_cells(grid, 0.5, random.Random(seed + i)) for i in range(2)])
    pixels, own = to_pixels(cells, height, width)
    for i in range(2):
        total = 0
        for y in range(height):
            for x in range(width):
                expected = bool(cells[i, y * grid // height, x * grid // width])
                assert bool(pixels[i, y, x]) == expected
                total += expected
        assert float(own[i]) == pytest.approx(total / (height * width), abs=1e-6)
