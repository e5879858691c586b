"""What ``mixmask status`` shows at a glance."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from mixmask.launch.suite.manifest import Launch
from mixmask.launch.suite.overview import overview
from mixmask.launch.suite.status import CellStatus, State


def cell(name: str, state: State, detail: str = "", log: str | None = None) -> CellStatus:
    return CellStatus(f"pretrain-{name}", "pretrain", state, detail, 0, "12_3", log, f"/runs/{name}")


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
    assert lines[1] == f"pretrain-{LONG}"  # whole, though it is wider than the screen
    assert lines[2].split() == ["0:", "60.25", "1:", "61.25", "2:", "62.25", "3:", "63.25", "4:", "64.25"]
    assert lines[3].split() == ["5:", "65.25", "6:", "66.25"]
    assert lines[5].split() == ["0:", "37", "%", "1:", "failed", "2:", "waits"]
    assert lines[7].split() == ["–"]
    assert lines[8:12] == [
        "pretrain-moco_seed-0  running",
        "    37 % · 1,240 images/s · 2 h 05 min left · 12_3",
        "pretrain-moco_seed-1  failed",
        "    error: /data/x: no such data folder · 12_3 · jobs/x.out",
    ]
    assert all(len(line) <= 80 for line in lines if LONG not in line)


def test_a_short_screen_counts_what_it_leaves_out() -> None:
    found = [cell(f"moco_seed-{seed}", "failed", "error: x") for seed in range(20)]
    assert "… and 17 more cells that run or did not end well" in shown(found, rows=10)


def test_names_from_outside_cannot_move_the_cursor() -> None:
    text = "\n".join(shown([cell("\x1b[31mred", "failed", "error: \x1b[2J")]))
    assert "\x1b" not in text
    assert "\\x1b[31mred" in text
