"""What ``mixmask status`` shows at a glance."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from mixmask.engine.errors import UserError
from mixmask.launch.suite.manifest import Launch, LaunchedCell
from mixmask.launch.suite.overview import overview
from mixmask.launch.suite.status import CellStatus, State, find_cell


def launched(name: str) -> LaunchedCell:
    """As a suite makes it: its id has a fingerprint that its name has not."""
    fingerprint = f"{hash(name) % 16**12:012x}"
    run = Path(f"/runs/transfer/{name}-{fingerprint}")
    return LaunchedCell(
        id=f"transfer/{run.name}", stage="transfer", name=name, protocol="knn", dataset="x", seed=0, run=run, done=(),
        parent=None,
    )  # fmt: skip


def cell(name: str, state: State, detail: str = "", log: str | None = None) -> CellStatus:
    one = launched(name)
    return CellStatus(one.id, one.recipe, one.seeds, one.stage, state, detail, 0, "12_3", log, str(one.run))


def shown(found: list[CellStatus], rows: int | None = None, width: int = 80) -> list[str]:
    launch = Launch.model_construct(suite="table5", folder=Path("/runs/suites/table5/launches/1"), cells=())
    screen = io.StringIO()
    Console(file=screen, width=width).print(overview(launch, found, rows), crop=False)
    return screen.getvalue().splitlines()


LONG = "cifar100-moco-mixmask-unmix-with-a-long-name-cifar100-knn-with-k-200-and-a-temperature-of-0.1"


def test_recipes_by_seeds_fit_a_terminal_and_ids_are_whole() -> None:
    found = [cell(f"{LONG}_seed-{seed}", "done", f"knn/top1 6{seed}.25") for seed in range(7)]
    found += [
        cell("moco_seed-0", "running", "37 % · 1,240 images/s · 2 h 05 min left"),
        cell(
            "moco_seed-1", "failed", "error: /data/x: no such data folder", "/runs/suites/table5/launches/1/jobs/x.out"
        ),
        cell("moco_seed-2", "pending", "for its turn"),
        cell("alone", "not started"),
    ]
    lines = shown(found)
    assert lines[0] == "table5: 7 done, 1 running, 1 failed, 1 pending, 1 not started"
    assert lines[1] == f"transfer/{LONG}  knn/top1"  # whole, though it is wider than the screen
    assert lines[2].split() == ["0:", "60.25", "1:", "61.25", "2:", "62.25", "3:", "63.25", "4:", "64.25"]
    assert lines[3].split() == ["5:", "65.25", "6:", "66.25"]
    assert lines[5].split() == ["0:", "37", "%", "1:", "failed", "2:", "waits"]
    assert lines[7].split() == ["–"]
    assert lines[8:13] == [
        f"{launched('moco_seed-0').id}  running",
        "    37 % · 1,240 images/s · 2 h 05 min left · job 12_3",
        f"{launched('moco_seed-1').id}  failed",
        "    error: /data/x: no such data folder · job 12_3",
        "    /runs/suites/table5/launches/1/jobs/x.out",
    ]
    assert all(len(line) <= 80 for line in lines if LONG not in line)


def test_seeds_of_the_backbone_and_of_the_cell_share_the_line_of_their_recipe() -> None:
    found = [cell(f"moco_seed-{b}-linear_seed-{c}", "done", "linear/top1 -1.5") for b in (0, 1) for c in (0, 1)]
    lines = shown(found)
    assert lines[1] == "transfer/moco-linear  linear/top1"
    assert lines[2].split() == ["0/0:", "-1.5", "0/1:", "-1.5", "1/0:", "-1.5", "1/1:", "-1.5"]


def test_entries_of_one_name_are_told_apart_by_their_ids() -> None:
    first = cell("moco-knn", "done", "knn/top1 50.00")
    second = replace(first, cell="transfer/moco-knn-000000000000", detail="knn/top1 60.00")
    lines = shown([first, second])
    assert lines[1].startswith(first.cell)
    assert lines[3].startswith(second.cell)


def test_what_status_shows_names_a_cell_for_logs() -> None:
    cells = (launched("moco_seed-0-knn"), launched("moco_seed-1-knn"), launched("simclr-knn"))
    launch = Launch.model_construct(suite="table5", folder=Path("/x"), cells=cells)
    for one in cells:
        assert find_cell([launch], one.id) == (launch, one)
        assert find_cell([launch], f"transfer/{one.name}") == (launch, one)
    assert find_cell([launch], "transfer/simclr-knn") == (launch, cells[2])
    with pytest.raises(UserError) as refused:
        find_cell([launch], cells[0].recipe)
    assert all(one.id in str(refused.value).splitlines() for one in cells[:2])


def test_a_short_screen_counts_what_it_leaves_out() -> None:
    found = [cell(f"moco_seed-{seed}", "failed", "error: x") for seed in range(20)]
    assert "… and 19 more cells that run or did not end well" in shown(found, rows=10)


def test_names_from_outside_cannot_move_the_cursor() -> None:
    text = "\n".join(shown([cell("\x1b[31mred", "failed", "error: \x1b[2J")]))
    assert "\x1b" not in text
    assert "\\x1b[31mred" in text
