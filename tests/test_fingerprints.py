"""Fingerprints outlive every refactoring: finished runs of earlier versions are found again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixmask.engine.builtin_configs import configs_folder
from mixmask.engine.config import fingerprint_of, fingerprinted, identity, load_recipe
from mixmask.pretrain.recipe import PretrainRecipe
from mixmask.transfer.recipe import load_transfer_recipe

KEPT = json.loads(Path(__file__).with_name("fingerprints.json").read_text())  # each was written when its recipe came


@pytest.mark.parametrize("config", KEPT)
def test_the_recipes_that_come_with_the_project_keep_their_fingerprints(config: str) -> None:
    path = configs_folder() / config
    if "pretrain" in config:
        found = fingerprint_of({"stage": "pretrain", **fingerprinted(load_recipe(PretrainRecipe, path))})
    else:
        recipe = load_transfer_recipe(path, ["backbone=b"])
        found = fingerprint_of({"stage": "transfer", **fingerprinted(recipe)}, parent="p")
    assert found == KEPT[config]


def test_keys_that_were_moved_are_still_read(tmp_path: Path) -> None:
    """C4's options stood beside those of the training before there were other detectors."""
    voc = configs_folder() / "transfer" / "detect_voc.yaml"
    new = load_transfer_recipe(
        voc, ["backbone=b", "detector.roi.batch_per_image=64", "detector.rpn.anchor_sizes=[16, 32]"]
    )
    old = load_transfer_recipe(voc, ["backbone=b", "roi.batch_per_image=64", "rpn={anchor_sizes: [16, 32]}"])
    assert old == new
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: {voc}\nroi: {{batch_per_image: 64}}\nrpn: {{anchor_sizes: [16, 32]}}\n")
    assert identity(load_transfer_recipe(file, ["backbone=b"])) == identity(new)
    written = {**new.model_dump(mode="json"), "rpn": {"anchor_sizes": [16, 32]}, "roi": {"batch_per_image": 64}}
    del written["detector"]
    assert type(new).model_validate(written) == new  # as an earlier version left it in a run directory
    with pytest.raises(Exception, match=r"^command line: detector\.roi\.batch_per_image: .*given: 0"):
        load_transfer_recipe(voc, ["backbone=b", "roi.batch_per_image=0"])
