"""Known checkpoints: the catalogue, and what a run makes of an entry."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from safetensors.torch import load_file

from mixmask.engine.builtin_configs import config_file
from mixmask.engine.errors import ConfigError, UserError
from mixmask.transfer.checkpoints.layouts import LAYOUTS
from mixmask.transfer.recipe import load_transfer_recipe
from mixmask.transfer.zoo import catalogue as catalogue_module
from mixmask.transfer.zoo.catalogue import ZooEntry, catalogue, known_checkpoint
from mixmask.transfer.zoo.references import locate_checkpoint, zoo_path
from tests.transfer.checkpoint_files import moco_checkpoint
from tests.transfer.file_server import Handler, serving, whole


@pytest.fixture
def server() -> Iterator[tuple[str, type[Handler]]]:
    with serving() as running:
        yield running


# --- the catalogue ---------------------------------------------------------------------------------------------------


def test_every_entry_can_be_used() -> None:
    entries = catalogue()
    assert len(entries) > 100
    assert len({entry.url for entry in entries.values() if not entry.by_hand}) == sum(
        not entry.by_hand for entry in entries.values()
    )
    for entry in entries.values():
        assert entry.url.startswith("https://"), entry.name
        assert entry.repository.startswith("https://github.com/"), entry.name
        if entry.keys and entry.arch.startswith("resnet"):
            fits = [layout.name for layout in LAYOUTS if re.fullmatch(layout.trunk, entry.keys)]
            assert fits or entry.prefix, f"{entry.name}: no layout has the prefix {entry.keys}"
        for number in entry.published:
            assert (number.config is None) == (number.metric is None), (entry.name, number.what)
            if number.config is not None:
                recipe = load_transfer_recipe(
                    config_file(Path(number.config), "transfer"), ["backbone=x", "data.root=x"]
                )
                assert number.metric in recipe.headlines, (entry.name, number.config, number.metric)


def test_the_systems_that_the_issue_names_are_there() -> None:
    titles = {entry.title for entry in catalogue().values()}
    wanted = {
        "MoCo v1", "MoCo v2", "MoCo v3", "SimCLR", "BYOL", "SwAV", "SimSiam", "Barlow Twins", "VICReg", "DINO",
        "DenseCL", "PixPro", "DetCo", "Supervised",
    }  # fmt: skip
    assert wanted <= titles
    publishers = {entry.repository.rsplit("/", 1)[-1] for entry in catalogue().values()}
    assert {"vision", "pytorch-image-models"} <= publishers


def test_what_moco_states() -> None:
    entry = known_checkpoint("mocov2-800ep")
    numbers = {number.what: number.value for number in entry.published}
    assert numbers["ImageNet linear top-1"] == 71.1
    assert numbers["VOC 2007 box AP"] == 57.4
    assert entry.md5 == "a04e12f8"
    assert entry.file_name == "moco_v2_800ep_pretrain.pth.tar"


def test_an_unknown_name_gets_the_closest_ones() -> None:
    with pytest.raises(UserError, match=r"zoo:mocov2-800: no such checkpoint\. Closest: mocov2-800ep"):
        locate_checkpoint("zoo:mocov2-800")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("checkpoints: {A B: {}}", "no name"),
        ("checkpoints: {a: {title: A, framework: a, arch: resnet50, url: ftp://x}}", "a.url"),
        ("checkpoints: {a: {title: A, framework: a, arch: resnet50, url: http://x, sha256: XYZ}}", "a.sha256"),
        ("checkpoints: {a: {framework: a, arch: resnet50, url: http://x}}", "a.title"),
    ],
)
def test_a_malformed_file_is_named(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head = "repository: https://github.com/a/b\nlicence: MIT\nread_in: [README.md]\n"
    monkeypatch.setattr(catalogue_module, "_files", lambda: iter([("lab/x.yaml", head + text)]))
    with pytest.raises(ConfigError, match=r"lab/x\.yaml") as caught:
        catalogue.__wrapped__()
    assert message in str(caught.value)


# --- labels and expectations -----------------------------------------------------------------------------------------


def recipe_of(config: str, *overrides: str) -> Any:
    overrides = ("backbone=zoo:mocov2-800ep", "data.root=somewhere", *overrides)
    return load_transfer_recipe(config_file(Path(config), "transfer"), overrides)


def test_a_checkpoint_labels_its_results_and_brings_the_numbers_that_it_should_reproduce() -> None:
    entry = known_checkpoint("mocov2-800ep")
    labelled = entry.labelled(recipe_of("detect_voc", "seed=3", "engine=detectron2"))
    assert (labelled.framework, labelled.method, labelled.pretrain_epochs) == ("mocov2", "vanilla", 800)
    assert labelled.pretrain_data == "imagenet1k"
    assert {(one.metric, one.value, one.tolerance) for one in labelled.expected} <= {
        ("bbox/AP", 57.4, 0.5), ("bbox/AP50", 82.5, 0.5), ("bbox/AP75", 64.0, 0.8),
    }  # fmt: skip
    of_shipped = entry.labelled(recipe_of("detect_voc", "seed=3"))
    assert len(of_shipped.expected) == 3
    assert "facebookresearch/moco" in of_shipped.expected[0].source
    assert [one.value for one in entry.labelled(recipe_of("linear")).expected] == [71.1]


def test_a_changed_protocol_expects_nothing_and_own_labels_stay() -> None:
    entry = known_checkpoint("mocov2-800ep")
    assert entry.labelled(recipe_of("detect_voc", "iterations=100")).expected == ()
    assert entry.labelled(recipe_of("linear", "lr=1")).expected == ()
    assert entry.labelled(recipe_of("linear_swav")).expected == ()
    own = entry.labelled(recipe_of("linear", "method=mine", "pretrain_epochs=3"))
    assert (own.method, own.pretrain_epochs, own.framework) == ("mine", 3, "mocov2")


# --- references ------------------------------------------------------------------------------------------------------


def entry_of(url: str, **more: Any) -> ZooEntry:
    return ZooEntry(
        name="ours", repository="https://github.com/a/b", licence="MIT", title="MoCo v2", framework="mocov2", epochs=7,
        data="imagenet1k", arch="resnet18", url=url, **more,
    )  # fmt: skip


def test_offline_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXMASK_ZOO", str(tmp_path))
    entry = known_checkpoint("swav-800ep")
    with pytest.raises(UserError, match=r"not downloaded yet: `mixmask zoo swav-800ep --fetch`"):
        locate_checkpoint("zoo:swav-800ep", download=False)
    with pytest.raises(UserError, match=r"needs a browser \(Google Drive\)"):
        locate_checkpoint("zoo:pixpro-400ep")
    place = tmp_path / "swav-800ep" / "swav_800ep_pretrain.pth.tar"
    assert zoo_path(entry) == place
    place.parent.mkdir()
    place.write_bytes(b"weights")
    assert locate_checkpoint("zoo:swav-800ep", download=False).path == place
    assert locate_checkpoint(str(place)).entry is None


@pytest.mark.slow
def test_a_run_on_a_checkpoint_of_the_zoo(
    server: tuple[str, type[Handler]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resnet18: Path, shapes: Path
) -> None:
    """From the address to a labelled record; a dry run downloads nothing."""
    from typer.testing import CliRunner

    from mixmask.launch.commands.app import app
    from mixmask.transfer.zoo import references

    url, handler = server
    moco = moco_checkpoint(tmp_path / "moco.pth", load_file(resnet18))
    handler.script[:] = [whole(moco.read_bytes())]
    entry = entry_of(url)
    monkeypatch.setenv("MIXMASK_ZOO", str(tmp_path / "zoo"))
    monkeypatch.setattr(references, "known_checkpoint", lambda name: entry)
    arguments = ["transfer", "knn_photos", "backbone=zoo:ours", f"data.root={shapes}", "--runs", str(tmp_path / "runs")]
    runner = CliRunner()
    dry = runner.invoke(app, [*arguments, "--dry-run"])
    assert handler.asked == []
    assert isinstance(dry.exception, UserError)
    assert runner.invoke(app, arguments, catch_exceptions=False).exit_code == 0
    (record,) = (tmp_path / "runs").rglob("record.json")
    found = json.loads(record.read_text())
    labels = ("framework", "method", "pretrain_epochs", "pretrain_dataset")
    assert [found[key] for key in labels] == ["mocov2", "vanilla", 7, "imagenet1k"]
    assert len(handler.asked) == 1


def test_addresses_are_plain() -> None:
    for entry in catalogue().values():
        host = urlsplit(entry.url).hostname
        assert host is not None
        assert re.fullmatch(r"[a-z0-9.-]+\.[a-z]+", host), entry.name
