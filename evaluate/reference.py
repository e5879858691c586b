"""The shipped recipes behind each row of the paper: only results that follow them meet its published numbers.

``reference.json`` holds their identities (`engine.config.identity`); ``make reference`` writes it. A result is shown
beside a published number only if its recipe and its backbone's equal the shipped ones in every key, except those in
`MAY_DIFFER`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cache
from importlib import resources
from typing import Any

from mixmask.engine.records import Record
from mixmask.evaluate.names import text_of
from mixmask.evaluate.results import Result, facts, of_backbone

# Keys in which a run may differ from the shipped recipe, and why. A key stands for all below it.
MAY_DIFFER = {
    "seed": "means are over seeds",
    "precision": "the publication does not say, and the recipes' own headers advise bf16 on GPUs",
    "compile": "changes rounding only",
    "monitor": "watches the run and changes no weight",
    "data.storage": "how images are kept: crops are drawn alike, and their pixels differ by rounding",
    "engine": "both detection engines are proven equal; a footnote names the engine",
}
UNSTATED = {  # (protocol, data set): keys that matter, but that the paper does not state
    ("linear", "cifar100"): ("lr", "epochs", "batch_size"),
    ("linear", "tiny_imagenet"): ("lr", "epochs", "batch_size"),
    ("detect_voc", "voc2007"): ("pretrain.epochs",),
    ("detect_coco", "coco2017"): ("pretrain.epochs",),
}
FOREIGN = ("pretrain.arch", "pretrain.dataset", "pretrain.epochs")  # known of a backbone whose recipe is not
MOST = 6  # the most departures that a footnote lists


@cache
def _document() -> dict[str, Any]:
    text = resources.files("mixmask.evaluate").joinpath("reference.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    recipes = document["pretrain"]
    for name, recipe in recipes.items():
        if "like" in recipe:
            recipes[name] = {**recipes[recipe.pop("like")], **recipe}
    return document


@cache
def _rows() -> dict[tuple[str, ...], dict[str, Any]]:
    names = ("dataset", "framework", "method", "protocol")
    return {tuple(row[name] for name in names): row for row in _document()["rows"]}


def stated(dims: Mapping[str, Any]) -> dict[str, Any]:
    """How the shipped recipes of a row are made, under the names of `Result.known`; empty if there is no such row.

    Args:
        dims: As `Result.dims`: dataset, framework, method and protocol.
    """
    key = tuple(str(dims.get(name)) for name in ("dataset", "framework", "method", "protocol"))
    row = _rows().get(key)
    if row is None:  # no recipe for the backbone, but one for how it is measured
        row = next((one for place, one in _rows().items() if (place[0], place[3]) == (key[0], key[3])), None)
        if row is None:
            return {}
        pretrain = _document()["pretrain"][row["pretrain"]]
        measured = facts(_document()["transfer"][row["transfer"]], {}, None, None, None, "")
        return {
            **_known(measured),
            "pretrain.arch": pretrain["backbone"]["arch"],
            "pretrain.dataset": pretrain["data"]["name"],
        }
    pretrain = _document()["pretrain"][row["pretrain"]]
    arch, dataset, epochs = pretrain["backbone"]["arch"], pretrain["data"]["name"], pretrain["epochs"]
    return _known(facts(_document()["transfer"][row["transfer"]], pretrain, arch, dataset, epochs, key[2]))


def unstated(dims: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys that matter, but that the paper does not state."""
    return UNSTATED.get((str(dims.get("protocol")), str(dims.get("dataset"))), ())


def departures(result: Result, usual: Mapping[str, Any], ignored: Collection[str] = ()) -> dict[str, str]:
    """The keys in which a result departs from the stated recipe, each with a text.

    What was not recorded is no departure: the recipe of a foreign checkpoint, and everything that records of the first
    schema did not hold.

    Args:
        result: The result.
        usual: The stated recipe, as `stated` gives it; if it is empty, there are no departures.
        ignored: Keys that the result's place in the table already shows.
    """
    record, own = result.run.record, result.facts
    found: dict[str, str] = {}
    for key in sorted({*usual, *own}) if usual else ():
        if key in ignored or may_differ(key) or not _comparable(key, record, result.known, usual):
            continue
        ours, theirs = own.get(key, result.known.get(key)), usual.get(key)
        if ours != theirs:
            found[key] = f"{key} {_shown(ours)} (this row's recipe: {_shown(theirs)})"
    if usual and record.method == "mscn" and record.pretraining:
        found["pretrain.mix.kind"] = "an erase-based recipe of this project's (published: MSCN's own numbers)"
    return found


def _comparable(key: str, record: Record, known: Mapping[str, Any], usual: Mapping[str, Any]) -> bool:
    if record.method == "random":  # untrained: nothing of the recipe but its network counts
        return key == "pretrain.arch" if of_backbone(key) else bool(record.recipe) or known.get(key) is not None
    if not of_backbone(key):
        return bool(record.recipe) or known.get(key) is not None
    if key in FOREIGN:
        return known.get(key) is not None and key in usual
    return bool(record.pretraining)


def may_differ(key: str) -> bool:
    """Whether `MAY_DIFFER` has the key, of the run or of its backbone."""
    plain = key.removeprefix("pretrain.")
    return any(plain == name or plain.startswith(f"{name}.") for name in MAY_DIFFER)


def in_words(texts: Collection[str]) -> str:
    """Departures as one text; of more than `MOST`, the first ones and a count."""
    listed = list(texts)
    rest = len(listed) - MOST
    return "; ".join([*listed[:MOST], *([f"and {rest} more keys"] if rest > 0 else [])])


def _known(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if not may_differ(key)}


def _shown(value: Any) -> str:
    return "default" if value is None else text_of(value)
