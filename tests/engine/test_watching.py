from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from mixmask.engine.errors import ConfigError
from mixmask.engine.storage import RunDirectory
from mixmask.engine.watching import WatchRecipe, check_watch, open_sinks


def test_nothing_is_opened_unless_asked_for(tmp_path: Path) -> None:
    assert open_sinks(WatchRecipe(), RunDirectory(tmp_path), "run", "f", {}, 0) == []


def test_tensorboard_gets_the_log_and_a_resumed_run_replaces_its_tail(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = WatchRecipe(tensorboard=True)
    check_watch(recipe)
    for first, lines in ((0, [(1, 5.0), (2, 4.0), (3, 9.0)]), (2, [(3, 3.0), (4, 2.0)])):
        (sink,) = open_sinks(recipe, RunDirectory(tmp_path), "run", "f", {}, first)
        for step, loss in lines:
            sink.log(step, {"loss": loss, "lr": 0.1})
        sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0)]


def test_weights_and_biases_is_opened_under_the_runs_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Session:
        def log(self, values: dict[str, float], step: int) -> None:
            seen.append((step, values))

        def finish(self) -> None:
            seen.append("finished")

    class Package:
        @staticmethod
        def init(**settings: Any) -> Session:
            seen.append(settings)
            return Session()

    monkeypatch.setitem(__import__("sys").modules, "wandb", Package)
    (sink,) = open_sinks(WatchRecipe(wandb_project="p"), RunDirectory(tmp_path), "run", "abc", {"epochs": 1}, 0)
    sink.log(7, {"loss": 1.0})
    sink.close()
    assert seen[0]["project"] == "p"
    assert (seen[0]["id"], seen[0]["resume"], seen[0]["config"]) == ("abc", "allow", {"epochs": 1})
    assert seen[1:] == [(7, {"loss": 1.0}), "finished"]


def test_weights_and_biases_itself_takes_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed; the test above checks the calls")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (sink,) = open_sinks(WatchRecipe(wandb_project="p"), RunDirectory(tmp_path), "run", "abc", {"epochs": 1}, 0)
    sink.log(1, {"loss": 1.0})
    sink.close()
    assert list(tmp_path.glob("wandb/offline-run-*-abc/*.wandb"))


def test_a_missing_package_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name in ("wandb", "tensorboard"):
            raise ImportError(f"No module named '{name}'")
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'mixmask\[tensorboard\]'"):
        check_watch(WatchRecipe(tensorboard=True))
    with pytest.raises(ConfigError, match=r"watch\.wandb_project is set, but wandb cannot be imported"):
        check_watch(WatchRecipe(wandb_project="p"))
    check_watch(WatchRecipe())


def test_the_log_is_written_in_any_case(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.log({"step": 1, "loss": 2.0})
    assert json.loads(run.log_file.read_text()) == {"step": 1, "loss": 2.0}
