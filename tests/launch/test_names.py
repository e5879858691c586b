"""Configs by name, from any folder."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path

import pytest
import typer

from mixmask.engine.builtin_configs import KINDS, config_file, configs_folder, listed_configs
from mixmask.engine.config import identity, load_recipe
from mixmask.engine.errors import ConfigError
from mixmask.launch.commands.app import app, main
from mixmask.launch.commands.command_help import GROUPS, GroupedCommands
from mixmask.pretrain.recipe import PretrainRecipe
from mixmask.transfer.recipe import load_transfer_recipe


def test_every_config_has_a_name_and_says_what_it_is() -> None:
    found = listed_configs()
    assert {kind for kind, _, _ in found} == set(KINDS)
    assert all(about for _, _, about in found)
    for kind, name, _ in found:
        path = config_file(Path(name), kind)
        assert path == configs_folder() / kind / f"{name}.yaml"
        if kind == "pretrain":
            load_recipe(PretrainRecipe, path)
        elif kind == "transfer" and name != "robustness":  # it reads the classifier that it is given
            assert not load_transfer_recipe(path, ["backbone=x"]).remarks()


def test_names_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    knn = configs_folder() / "transfer" / "knn.yaml"
    for given in ("knn", "knn.yaml", "configs/transfer/knn.yaml"):
        assert config_file(Path(given), "transfer") == knn
    (tmp_path / "knn").write_text("mine")
    assert config_file(Path("knn"), "transfer") == Path("knn")
    with pytest.raises(ConfigError, match=r"knn_foto: no such config file, .* Did you mean 'knn_photos'"):
        config_file(Path("knn_foto"), "transfer")
    with pytest.raises(ConfigError, match="no such config file"):
        load_recipe(PretrainRecipe, config_file(Path("sub/absent.yaml"), "pretrain"))


def test_a_config_of_another_kind_is_said_to_be_one() -> None:
    with pytest.raises(ConfigError, match=r"^knn_photos: is a config for transfer, not for pretrain"):
        config_file(Path("knn_photos"), "pretrain")


def test_a_base_is_named_like_any_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar100_moco").write_text("not what is meant: bases are relative to the file")
    mine = tmp_path / "sub" / "cifar100_moco.yaml"
    mine.parent.mkdir()
    mine.write_text("base: cifar100_moco\nepochs: 7\n")
    theirs = identity(load_recipe(PretrainRecipe, configs_folder() / "pretrain" / "cifar100_moco.yaml"))
    assert identity(load_recipe(PretrainRecipe, mine)) == {**theirs, "epochs": 7}
    mine.write_text("base: cifar100_moko\n")
    with pytest.raises(
        ConfigError, match=r"^sub/cifar100_moco.yaml: base: cifar100_moko: .* Did you mean 'cifar100_moco'"
    ):
        load_recipe(PretrainRecipe, Path("sub/cifar100_moco.yaml"))
    mine.write_text("base: ../absent.yaml\n")
    with pytest.raises(ConfigError, match=r"^sub/cifar100_moco.yaml: base: sub/../absent.yaml: no such file"):
        load_recipe(PretrainRecipe, Path("sub/cifar100_moco.yaml"))


def test_they_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["mixmask", "configs", "transfer"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    said = capsys.readouterr().out
    assert said.startswith("transfer\n")
    for name in ("knn_photos", "linear_photos", "finetune_photos", "detect_voc_smoke"):
        assert f"  {name}\n      " in said


def test_help_names_every_command_once_with_a_whole_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {}
    for option in ("-h", "--help", "--version"):
        monkeypatch.setattr(sys, "argv", ["mixmask", option])
        with pytest.raises(SystemExit):
            main()
        said[option] = capsys.readouterr().out
    assert said["-h"] == said["--help"]
    assert "…" not in said["-h"]
    assert "..." not in said["-h"].replace("ARGS]...", "")
    assert "Others" not in said["-h"]  # every command has its group
    group = typer.main.get_command(app)
    assert isinstance(group, GroupedCommands)
    commands = set(group.commands)
    assert commands == {name for names in GROUPS.values() for name in names}
    for name in commands:
        assert len(re.findall(rf"^  {name} ", said["-h"], re.MULTILINE)) == 1
    assert re.fullmatch(r"mixmask \d\S* \(torch \d\S*, torchvision \d\S*\)\n", said["--version"])


def test_messages_of_the_validation_library_are_not_shown(tmp_path: Path) -> None:
    for config, key, ours in (
        ("pretrain/cifar100_moco", "epochs=x", "epochs: a whole number was expected"),
        ("pretrain/cifar100_moco", "optimizer.lr=-1", "optimizer.lr: must be greater than 0"),
        ("pretrain/cifar100_moco", "mix=3", "mix"),
        ("transfer/linear", "milestones=3", "milestones: a list was expected"),
        ("transfer/detect_voc", "data.train=[]", r"data.train: needs at least 1 value\(s\)"),
        ("transfer/detect_voc", "precision=fp8", "precision: must be 'fp32', 'bf16' or 'fp16'"),
        ("transfer/linear", "sync_bn=maybe", "unknown key"),
        ("transfer/linear", "name=3", "name: a text was expected"),
    ):
        path = configs_folder() / f"{config}.yaml"
        load = partial(load_recipe, PretrainRecipe) if config.startswith("pretrain") else load_transfer_recipe
        with pytest.raises(ConfigError, match=ours) as caught:
            load(path, ["backbone=x", key] if load is load_transfer_recipe else [key])
        assert not re.search(r"(Input|Tuple|List|String) should", str(caught.value))


BOMBS = {
    "aliases": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "itself": "a: &a [*a]\n",
    "nested": "a: " + "[" * 5000 + "]" * 5000 + "\n",
    "large": "a: " + "x" * 11_000_000,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("bomb", BOMBS)
def test_yaml_that_expands_without_end_is_refused(bomb: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(BOMBS[bomb])
    with pytest.raises(ConfigError, match=r"x\.yaml: .*(expand to more|nested too deeply|at most)"):
        load_recipe(PretrainRecipe, path)


def test_honest_aliases_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    base = configs_folder() / "pretrain" / "cifar100_moco.yaml"
    path.write_text(f"base: {base}\nname: &name mine\ndata: {{name: *name, root: /x}}\n")
    assert load_recipe(PretrainRecipe, path).data.name == "mine"
