"""The catalogue of known checkpoints: one YAML file per publisher in ``entries/``, found by being there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, model_validator

from mixmask.engine.builtin_configs import config_file
from mixmask.engine.config import Recipe, fingerprinted, recipe_of_text
from mixmask.engine.errors import ConfigError, UserError
from mixmask.engine.expected import Expectation
from mixmask.engine.registry import load_entry_points
from mixmask.engine.wording import closest_first
from mixmask.transfer.protocol import LABELS, TransferRecipe
from mixmask.transfer.recipe import load_transfer_recipe

# How far a reproduction may be from the published number, in points. VOC's seeds differ by 0.2 to 0.4 (protocols of MoCo).
TOLERANCE = {"bbox/AP75": 0.8, "segm/AP75": 0.8}
USUAL_TOLERANCE = 0.5


class PublishedNumber(Recipe):
    """A transfer number that the publisher states.

    ``config`` and ``metric`` are set where one of our configs measures the same thing: a run of it is then checked
    against the number (`mixmask verify`).
    """

    what: str
    value: float
    source: str
    how: str = ""
    config: str | None = None
    metric: str | None = None


class ZooEntry(Recipe):
    """A checkpoint that somebody publishes.

    ``sha256`` and ``md5`` are digests as published: the whole, or its first digits. ``by_hand`` says where a browser is
    needed to get it. ``keys`` is what the tensors' names begin with, as the
    publisher's code shows; ``prefix`` is set where that alone does not lead to the network that the publisher takes.
    """

    name: str
    repository: str
    licence: str
    title: str
    framework: str
    method: str = "vanilla"
    arch: str
    epochs: float | None = None
    data: str | None = None
    url: str = Field(pattern=r"^https?://\S+$")
    file: str | None = Field(None, pattern=r"^[\w.+-]+$")
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{8,64}$")
    md5: str | None = Field(None, pattern=r"^[0-9a-f]{8,32}$")
    by_hand: str = ""
    keys: str = ""
    prefix: str | None = None
    notes: str = ""
    published: tuple[PublishedNumber, ...] = ()

    @property
    def file_name(self) -> str:
        """What the file is called on disk: as at its address, where that is a plain name."""
        last = urlsplit(self.url).path.rsplit("/", 1)[-1]
        plain = re.fullmatch(r"[\w.+-]+\.(?:pth|pt|tar|torch|pkl|ckpt|safetensors)", last)
        return self.file or (last if plain else f"{self.name}.pth")

    @property
    def labels(self) -> dict[str, Any]:
        """How its results are labelled, by the keys of transfer recipes."""
        values = {
            "framework": self.framework,
            "method": self.method,
            "pretrain_epochs": self.epochs,
            "pretrain_data": self.data,
        }
        return {key: values[key] for key in LABELS if values[key] is not None}

    def labelled(self, recipe: TransferRecipe) -> TransferRecipe:
        """A transfer recipe with this checkpoint's labels and published numbers, where it has none of its own."""
        labels = {key: value for key, value in self.labels.items() if getattr(recipe, key) is None}
        expected = recipe.expected or self.expectations(recipe)
        return recipe.model_copy(update={**labels, "expected": expected})

    def expectations(self, recipe: TransferRecipe) -> tuple[Expectation, ...]:
        """The published numbers that a run of this recipe should reproduce: those of the shipped config that it equals."""
        found = []
        for number in self.published:
            if number.config is not None and number.metric is not None and _measures_like(recipe, number.config):
                tolerance = TOLERANCE.get(number.metric, USUAL_TOLERANCE)
                source = f"{urlsplit(self.repository).path.strip('/')}: {number.source}"
                found.append(Expectation(metric=number.metric, value=number.value, tolerance=tolerance, source=source))
        return tuple(found)


class Publisher(Recipe):
    """One file of the catalogue.

    ``repository`` states the addresses, ``read_in`` names the files in which they were read, with their commits.
    """

    repository: str
    licence: str
    read_in: tuple[str, ...] = Field(min_length=1)
    checkpoints: dict[str, dict[str, Any]] = Field(min_length=1)

    @model_validator(mode="after")
    def _names(self) -> Publisher:
        bad = [name for name in self.checkpoints if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name)]
        if bad:
            raise ValueError(f"checkpoints: {bad[0]!r} is no name: lower-case letters, digits, dots and hyphens")
        return self


@cache
def catalogue() -> dict[str, ZooEntry]:
    """Every known checkpoint by its name.

    Raises:
        ConfigError: If a file of a package is malformed, or two checkpoints have one name.
    """
    found: dict[str, ZooEntry] = {}
    for where, text in _files():
        publisher = recipe_of_text(Publisher, text, where)
        common = {"repository": publisher.repository, "licence": publisher.licence}
        for name, values in publisher.checkpoints.items():
            try:
                entry = ZooEntry.model_validate({**common, **values, "name": name})
            except ValidationError as error:
                first = error.errors()[0]
                raise ConfigError(f"{where}: {name}.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
            if name in found:
                raise ConfigError(f"{where}: {name} is the name of two checkpoints")
            found[name] = entry
    return found


def known_checkpoint(name: str) -> ZooEntry:
    """The checkpoint of a name.

    Raises:
        UserError: If there is none; the closest names are listed.
    """
    entries = catalogue()
    if name not in entries:
        near = ", ".join(closest_first(name, entries)[:5])
        raise UserError(f"zoo:{name}: no such checkpoint. Closest: {near}. `mixmask zoo` lists all {len(entries)}")
    return entries[name]


def _files() -> Iterator[tuple[str, str]]:
    packages = ["mixmask.transfer.zoo.entries", *(module.__name__ for module in load_entry_points("mixmask.zoo"))]
    for package in packages:
        for file in sorted(resources.files(package).iterdir(), key=lambda one: one.name):
            if file.name.endswith(".yaml"):
                yield f"{package}/{file.name}", file.read_text(encoding="utf-8")


@cache
def _shipped(config: str) -> dict[str, Any]:
    overrides = ["backbone=any", "data.root=any"]
    return _without_seed(load_transfer_recipe(config_file(Path(config), "transfer"), overrides))


def _without_seed(recipe: TransferRecipe) -> dict[str, Any]:
    return {key: value for key, value in fingerprinted(recipe).items() if key != "seed"}


def _measures_like(recipe: TransferRecipe, config: str) -> bool:
    return _without_seed(recipe) == _shipped(config)
