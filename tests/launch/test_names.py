"""Configs by name, from any folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from engine.config import load_recipe
from engine.errors import ConfigError
from launch.builtin import KINDS, config_file, configs_folder, listed_configs
from launch.cli import main
from pretrain.recipe import PretrainRecipe
from transfer.recipe import load_transfer_recipe


def test_every_config_has_a_name_and_says_what_it_is() -> None:
    found = listed_configs()
    assert {kind for kind, _, _ in found} == set(KINDS)
    assert all(about for _, _, about in found)
    for kind, name, _ in found:
        path = config_file(Path(name), kind)
        assert path == configs_folder() / kind / f"{name}.yaml"
        if kind == "pretrain":
            load_recipe(PretrainRecipe, path)
        elif kind == "transfer":
            assert not load_transfer_recipe(path, ["backbone=x"]).remarks()


def test_names_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    knn = configs_folder() / "transfer" / "knn.yaml"
    for given in ("knn", "knn.yaml", "configs/transfer/knn.yaml"):
        assert config_file(Path(given), "transfer") == knn
    (tmp_path / "knn").write_text("mine")
    assert config_file(Path("knn"), "transfer") == Path("knn")
    with pytest.raises(ConfigError, match=r"knn_foto: no such config file, .* did you mean knn_photos"):
        config_file(Path("knn_foto"), "transfer")
    with pytest.raises(ConfigError, match="no such config file"):
        load_recipe(PretrainRecipe, config_file(Path("sub/absent.yaml"), "pretrain"))


def test_they_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["mixmask", "configs", "transfer"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    said = capsys.readouterr().out
    assert said.startswith("transfer\n")
    for name in ("knn_photos", "linear_photos", "finetune_photos", "detect_voc_smoke"):
        assert f"  {name}\n      " in said
