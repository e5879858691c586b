"""Writes ``evaluate/reference.json``: the shipped recipes behind each row of the paper's tables.

Run ``make reference`` (``python -m mixmask.launch.suite.reference``) after you change a recipe or a suite; a test
compares the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mixmask.engine.builtin_configs import configs_folder
from mixmask.engine.config import identity
from mixmask.evaluate.published import published_tables
from mixmask.launch.slurm.profile import Profile
from mixmask.launch.suite.cells import Cell, expand
from mixmask.launch.suite.suite import load_suite
from mixmask.pretrain.recipe import PretrainRecipe

FILE = Path(__file__).resolve().parents[2] / "evaluate" / "reference.json"


def reference() -> dict[str, Any]:
    """Every row of the paper's tables with the identities of the shipped recipes for it.

    Each recipe is listed once, by name. A pretraining recipe holds only its differences from the first one with the
    same data set and framework.
    """
    folder = configs_folder() / "suites"
    pretrain: dict[str, dict[str, Any]] = {}
    transfer: dict[str, dict[str, Any]] = {}
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    suites = [table.suite for table in published_tables().values() if table.suite is not None]
    for suite in suites:  # the first that has a row gives its recipes
        cells = {
            cell.id: cell for cell in expand(load_suite(folder / f"{suite}.yaml"), folder, Profile(), Path("runs"))
        }
        for cell in cells.values():
            if cell.stage != "transfer" or cell.parent is None:
                continue
            own, parent = cell.recipe, cells[cell.parent].recipe
            assert own is not None
            assert isinstance(parent, PretrainRecipe)
            if getattr(parent.mix, "permutation", "different") == "same":  # table 2's ablation
                continue
            key = (cell.dataset, parent.framework.kind, parent.method, cell.protocol)
            if key not in rows:
                rows[key] = {"pretrain": _name(cells[cell.parent]), "transfer": f"{cell.protocol} on {cell.dataset}"}
                pretrain.setdefault(rows[key]["pretrain"], _without_seed(identity(parent)))
                transfer.setdefault(rows[key]["transfer"], _without_seed(identity(own)))
    names = ("dataset", "framework", "method", "protocol")
    return {
        "pretrain": _compact(pretrain),
        "transfer": transfer,
        "rows": [{**dict(zip(names, key, strict=True)), **row} for key, row in sorted(rows.items())],
    }


def _name(cell: Cell) -> str:
    recipe = cell.recipe
    assert isinstance(recipe, PretrainRecipe)
    return f"{recipe.data.name} {recipe.framework.kind} {recipe.method}, {recipe.epochs} epochs"


def _without_seed(recipe: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key != "seed"}


def _compact(recipes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each recipe as its differences from the first one of its data set and framework, which ``like`` names."""
    firsts: dict[tuple[str, str], str] = {}
    result = {}
    for name, recipe in sorted(recipes.items()):
        first = firsts.setdefault((recipe["data"]["name"], recipe["framework"]["kind"]), name)
        assert recipe.keys() >= recipes[first].keys()
        changes = {key: value for key, value in recipe.items() if recipes[first].get(key) != value}
        result[name] = recipe if first == name else {"like": first, **changes}
    return result


def text() -> str:
    """The file's content."""
    return json.dumps(reference(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(FILE)
