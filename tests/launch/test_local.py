"""Suites on this machine: in this process, and as processes that submitit starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mixmask.engine.backbones import load_backbone
from mixmask.engine.errors import Interrupted, UserError
from mixmask.engine.records import Record
from mixmask.launch.commands.app import app
from mixmask.launch.slurm.attempts import Attempts
from mixmask.launch.suite import manifest
from tests.launch.small import ENDLESS, KNN, MIXMASK, RANDOM, found, launch, profile, write_suite


@pytest.mark.slow
def test_inline_a_failure_leaves_the_rest_and_a_relaunch_does_what_is_missing(
    tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {**MIXMASK, "set": {"data.root": str(tmp_path / "elsewhere")}}
    suite = write_suite(tmp_path, [{"pretrain": [RANDOM, broken], "transfer": [KNN]}], shapes)
    runs = tmp_path / "runs"
    assert not launch(suite, runs, profile(), check_data=False, cluster="inline")
    said = capsys.readouterr()
    assert "left out, because pretrain/mixmask-" in said.err
    assert "2 of 4 cells are finished" in said.out
    logs = {name: one.log for name, one in found(runs).items()}
    assert logs["mixmask-knn"] is None
    assert logs["mixmask"] is not None
    assert "no such data folder" in Path(logs["mixmask"]).read_text()
    assert "Traceback" not in Path(logs["mixmask"]).read_text()
    with pytest.raises(SystemExit, match="0"):
        app(["logs", "random-knn", "--runs", str(runs)])
    assert "kNN top-1" in capsys.readouterr().out
    assert {name: one.state for name, one in found(runs).items()} == {
        "random": "done",
        "mixmask": "failed",
        "random-knn": "done",
        "mixmask-knn": "not started",
    }
    (tmp_path / "elsewhere").symlink_to(shapes)
    assert launch(suite, runs, profile(), cluster="inline")
    assert "4 of 4 cells are finished" in capsys.readouterr().out
    assert {one.state for one in found(runs).values()} == {"done"}
    first = Attempts(Path(found(runs)["random"].run) / "attempts.jsonl").read()
    assert [line["event"] for line in first] == ["started", "done"]


@pytest.mark.slow
def test_inline_a_signal_stops_the_suite_and_it_goes_on(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixmask.launch.slurm.work import StageWork

    suite = write_suite(tmp_path, [{"pretrain": [MIXMASK, RANDOM]}], shapes)
    runs = tmp_path / "runs"
    seen = []

    def stopped(self: StageWork) -> None:
        seen.append(self.run)
        raise Interrupted("stopped at step 1", signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(StageWork, "__call__", stopped)
        with pytest.raises(Interrupted):
            launch(suite, runs, profile(), cluster="inline")
    assert len(seen) == 1
    assert found(runs)["mixmask"].state == "stopped"
    assert launch(suite, runs, profile(), cluster="inline")


@pytest.mark.slow
def test_labels_of_a_suite_reach_cells_that_were_finished_before(
    tmp_path: Path, shapes: Path, resnet18: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, _ = load_backbone(resnet18)
    torch.save(state, tmp_path / "theirs.pth")
    runs = tmp_path / "runs"
    for method in ("first", "second"):
        entry = {"path": "theirs.pth", "name": "theirs", "method": method}
        suite = write_suite(tmp_path, [{"checkpoints": [entry], "transfer": [KNN]}], shapes)
        assert launch(suite, runs, profile(), cluster="inline")
        (record,) = runs.glob("transfer/*/record.json")
        assert json.loads(record.read_text())["method"] == method
    assert "labels updated" in capsys.readouterr().err
    record.write_text("{")  # a damaged record is listed, and stops no launch
    launch(suite, runs, profile(), cluster="inline")
    said = capsys.readouterr()
    assert "its labels stay as they are" in said.err
    assert "damaged" in said.out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_inline_a_signal_between_steps_ends_the_suite_and_not_the_cell_alone(
    number: int, tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixmask.launch.slurm.work import StageWork

    suite = write_suite(tmp_path, [{"pretrain": [MIXMASK, RANDOM]}], shapes)
    seen = []

    def signalled(self: StageWork) -> None:
        seen.append(self.run)
        os.kill(os.getpid(), number)
        raise AssertionError("the signal was swallowed")

    theirs = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a script's background ignores
    monkeypatch.setattr(StageWork, "__call__", signalled)
    try:
        with pytest.raises(Interrupted):
            launch(suite, tmp_path / "runs", profile(), cluster="inline")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, theirs)
    assert len(seen) == 1


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_a_signal_stops_the_processes_with_a_checkpoint(number: int, tmp_path: Path, shapes: Path) -> None:
    """As a user would: the command in a terminal's process group, and Ctrl-C for the whole group."""
    suite = write_suite(tmp_path, [{"pretrain": [ENDLESS, {**RANDOM, "name": "later"}]}], shapes)
    runs = tmp_path / "runs"
    program = [sys.executable, "-m", "mixmask", "launch", str(suite), "--runs", str(runs), "--cluster", "local"]
    started = subprocess.Popen(
        program, start_new_session=True, stderr=subprocess.PIPE, text=True, preexec_fn=_hear_ctrl_c
    )
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in runs.glob("pretrain/*/log.jsonl")):
        assert time.monotonic() < deadline
        assert started.poll() is None
        time.sleep(0.1)
    os.killpg(started.pid, number)
    _, said = started.communicate(timeout=120)
    assert started.returncode == 128 + number, said
    assert "interrupted: stopped; the same command continues" in said
    (first,) = runs.glob("pretrain/*/log.jsonl")
    assert (first.parent / "checkpoint.pt").is_file()
    assert found(runs)["mixmask"].state == "stopped"


def test_local_has_one_node(tmp_path: Path, shapes: Path) -> None:
    two = {**MIXMASK, "resources": {"nodes": 2}}
    with pytest.raises(UserError, match="asks for 2 nodes; --cluster local has this one"):
        launch(write_suite(tmp_path, [{"pretrain": [two]}], shapes), tmp_path / "runs", profile(), cluster="local")


@pytest.mark.slow
def test_local_processes_share_a_batch_and_import_the_frozen_code(tmp_path: Path, shapes: Path) -> None:
    two = {**MIXMASK, "resources": {"tasks_per_node": 2}}
    suite = write_suite(tmp_path, [{"pretrain": [two], "transfer": [KNN]}], shapes)
    runs = tmp_path / "runs"
    assert launch(suite, runs, profile(), cluster="local")
    cells = found(runs)
    record = Record.read(Path(cells["mixmask"].run) / "record.json")
    assert record.environment["world_size"] == 2
    newest = manifest.latest(runs, "small")
    assert newest.snapshot is not None
    assert record.environment["git_commit"] == ((newest.snapshot / "COMMIT").read_text().strip() or None)
    assert "kNN top-1" in Path(str(cells["mixmask-knn"].log)).read_text()
