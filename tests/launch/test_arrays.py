"""How cells become arrays: every child beside its own parent, whatever the suite looks like."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mixmask.launch.slurm.profile import Resources
from mixmask.launch.suite.arrays import Array, plan_arrays
from mixmask.launch.suite.cells import Cell

SIZES = tuple(Resources(nodes=1, gpus_per_node=number, time_min=60) for number in (1, 8))


def cell(stage: str, number: int, size: int, parent: str | None = None) -> Cell:
    name = f"{stage}-{number}"
    return Cell(stage, name, f"{number:012x}", Path("/runs") / stage / name, SIZES[size], stage, "d", 0, parent=parent)


@st.composite
def suites(draw: st.DrawFn) -> list[Cell]:
    cells, number = [], 0
    for _ in range(draw(st.integers(0, 8))):
        number += 1
        parent = cell("pretrain", number, draw(st.integers(0, 1)))
        cells.append(parent)
        for _ in range(draw(st.integers(0, 4))):
            number += 1
            stage = draw(st.sampled_from(["convert", "transfer"]))
            cells.append(cell(stage, number, draw(st.integers(0, 1)), parent.id))
    for _ in range(draw(st.integers(0, 4))):
        number += 1
        outside = draw(st.sampled_from([None, "pretrain/queued", "pretrain/finished"]))
        cells.append(cell("transfer", number, draw(st.integers(0, 1)), outside))
    return cells


@given(suites(), st.integers(1, 5))
def test_every_cell_once_and_every_child_at_the_place_of_its_parent(cells: list[Cell], limit: int) -> None:
    arrays = plan_arrays(cells, {"pretrain/queued": "77_3"}, limit)
    assert Counter(one.id for array in arrays for one in array.cells) == Counter(one.id for one in cells)
    assert len({array.name for array in arrays}) == len(arrays)
    ids: dict[str, str] = {}
    for array in arrays:
        assert 1 <= len(array.cells) <= limit
        assert {one.resources for one in array.cells} == {array.resources}
        assert len({one.stage for one in array.cells}) == 1
        parents = [one.parent for one in array.cells]
        dependency = array.dependency(ids)
        if array.after is not None:
            assert array.after.name in ids  # submitted before
            assert parents == [one.id for one in array.after.cells]
            assert dependency == f"{'aftercorr' if len(parents) > 1 else 'afterok'}:{ids[array.after.name]}"
        elif dependency is not None:
            assert set(parents) == {"pretrain/queued"}
            assert dependency == "afterok:77_3"
        else:
            assert not set(parents) & {one.id for one in cells} | set(parents) & {"pretrain/queued"}
        ids[array.name] = str(100 + len(ids))


@given(st.integers(1, 6), st.integers(0, 3), st.integers(0, 3))
def test_a_plain_grid_is_an_array_per_stage_and_kind_of_child(backbones: int, small: int, large: int) -> None:
    cells = []
    for number in range(backbones):
        parent = cell("pretrain", number, 1)
        cells.append(parent)
        cells += [cell("transfer", 100 * (number + 1) + k, int(k >= small), parent.id) for k in range(small + large)]
    arrays: tuple[Array, ...] = plan_arrays(cells, {}, 1000)
    assert len(arrays) == 1 + small + large
    assert all(len(array.cells) == backbones for array in arrays)
