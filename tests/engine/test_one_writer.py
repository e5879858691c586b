"""Only one process writes to a run directory, also when another one was stopped, taken for dead, and woke up."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mixmask.engine.backbones import load_backbone
from mixmask.engine.errors import OwnershipLost, RunDirectoryError, RunFailure
from mixmask.engine.ownership import TAKEN_OVER, Owner, owned, read_owner
from mixmask.engine.storage import RunDirectory, write_text
from tests import zygote

PATIENCE = 1.0
RUN = """
import os, signal, sys, time
from pathlib import Path
import torch
import mixmask.engine.checkpoint
from mixmask.engine import ownership
from mixmask.engine.config import load_recipe
from mixmask.engine.errors import RunFailure, UserError
from mixmask.engine.storage import RunDirectory
from mixmask.pretrain import stage
from mixmask.pretrain.recipe import PretrainRecipe

config, run, moment, gate = sys.argv[1:]
ownership.Owner.__init__.__defaults__ = (0.1, PATIENCE, 0)
calls = {"save": 0, "log": 0, "finish": 0}

def at(name, original, which):
    def wrapped(*arguments, **named):
        calls[name] += 1
        if name == "save":
            original(*arguments, **named)  # the new checkpoint is written, and has not taken its name
        if moment == name and calls[name] == which:
            print("stopped", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        if moment == "gate" and name == "log" and calls[name] == 2:
            print("waiting", flush=True)
            while not Path(gate).exists():
                time.sleep(0.02)
        if name != "save":
            original(*arguments, **named)
    return wrapped

mixmask.engine.checkpoint.torch.save = at("save", torch.save, 2)
RunDirectory.log = at("log", RunDirectory.log, 5)
RunDirectory.finish = at("finish", RunDirectory.finish, 1)
try:
    stage.run(stage.plan(load_recipe(PretrainRecipe, config), Path(run).parent, Path(run)))
except (RunFailure, UserError) as error:
    print(f"failed: {error}", file=sys.stderr)
    sys.exit(1 if isinstance(error, RunFailure) else 2)
""".replace("PATIENCE", str(PATIENCE))
CONFIG = """
name: tiny
device: cpu
data: {name: shapes, root: ROOT, train: train, test: null, storage: resident}
backbone: {arch: resnet18, stem: standard}
framework: {kind: simsiam, dim: 8, projector_layers: 1}
augment: {crop: 32, scale: [0.3, 1.0]}
optimizer: {kind: sgd, lr: 0.01, weight_decay: 1e-4}
epochs: 1
max_steps: 8
batch_size: 8
log_every: 1
checkpoint_every: 2
"""


def start(config: Path, run: Path, moment: str = "", gate: Path = Path("none")) -> zygote.Started:
    arguments = ["-c", RUN, str(config), str(run), moment, str(gate)]
    return zygote.start(arguments, {**os.environ, "OMP_NUM_THREADS": "1"})


def says(process: zygote.Started, word: str) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == f"{word}\n", (line, process.stderr.read() if process.stderr and process.poll() is not None else "")


def contents(run: Path) -> dict[str, str]:
    """Every file but the owner's, by a digest of what is in it."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != "owner.json" and path.suffix != ".tmp"]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def config(shapes: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.replace("ROOT", str(shapes)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["save", "log", "finish"])
def test_a_process_that_wakes_after_the_run_was_finished_changes_nothing(
    moment: str, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    sleeper = start(config, run, moment)
    try:
        says(sleeper, "stopped")
        second = start(config, run)
        _, text = second.communicate(timeout=100)
        assert second.returncode == 0, text
        assert "has not been heard of for 1 s; taking over" in text
        finished = contents(run)
        assert {"record.json", "backbone.safetensors", "recipe.yaml", "log.jsonl"} == finished.keys() - {
            "changes.patch"
        }
        sleeper.send_signal(signal.SIGCONT)
        _, text = sleeper.communicate(timeout=60)
        assert sleeper.returncode == 1, text
        assert "no longer this process's" in text
        assert contents(run) == finished
    finally:
        sleeper.kill()
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["save", "log"])
def test_a_process_that_wakes_beside_the_new_owner_changes_nothing(moment: str, config: Path, tmp_path: Path) -> None:
    run, gate = tmp_path / "run", tmp_path / "gate"
    sleeper = start(config, run, moment)
    second = None
    try:
        says(sleeper, "stopped")
        second = start(config, run, "gate", gate)
        says(second, "waiting")
        before = contents(run)
        sleeper.send_signal(signal.SIGCONT)
        _, text = sleeper.communicate(timeout=60)
        assert sleeper.returncode == 1, text
        assert contents(run) == before  # the checkpoint has not gone back
        gate.touch()
        _, text = second.communicate(timeout=100)
        assert second.returncode == 0, text
    finally:
        sleeper.kill()
        if second is not None:
            second.kill()
    undisturbed = start(config, tmp_path / "other")
    assert undisturbed.wait(timeout=100) == 0
    ours, theirs = (load_backbone(folder / "backbone.safetensors")[0] for folder in (run, tmp_path / "other"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_process_that_wakes_before_anyone_took_over_goes_on(config: Path, tmp_path: Path) -> None:
    """A laptop that was closed for a while does not lose its run."""
    run = tmp_path / "run"
    sleeper = start(config, run, "save")
    try:
        says(sleeper, "stopped")
        time.sleep(2 * PATIENCE)
        sleeper.send_signal(signal.SIGCONT)
        _, text = sleeper.communicate(timeout=100)
        assert sleeper.returncode == 0, text
        assert (run / "record.json").is_file()
    finally:
        sleeper.kill()


@pytest.mark.slow
def test_a_folder_that_is_deleted_under_a_run_gets_no_record(config: Path, tmp_path: Path) -> None:
    run, gate = tmp_path / "run", tmp_path / "gate"
    process = start(config, run, "gate", gate)
    try:
        says(process, "waiting")
        for path in sorted(run.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        run.rmdir()
        gate.touch()
        _, text = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "the folder was deleted" in text
    assert "Traceback" not in text
    assert not run.exists() or not any(run.iterdir())


# --- one owner file --------------------------------------------------------------------------------------------------


def lost(owner: Owner) -> bool:
    try:
        owner.require()
    except OwnershipLost:
        return True
    return False


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[Owner]:
    owner = Owner(tmp_path / "run" / "owner.json", beat=60, patience=0.4)
    owner.acquire()
    yield owner
    owner.ended.set()  # else its heart beats a minute later, finds the file gone, and stops whatever test runs then
    assert owner.heart is not None
    owner.heart.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    "happens",
    [
        lambda file: file.unlink(),
        lambda file: file.write_text(""),
        lambda file: file.write_text("{]"),
        lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), "token": "theirs"})),
    ],
    ids=["gone", "empty", "garbage", "another's"],
)
@pytest.mark.parametrize("late", [False, True])
def test_a_missing_damaged_or_foreign_owner_file_is_not_mine(
    happens: Callable[[Path], None], late: bool, mine: Owner
) -> None:
    mine.require()
    if late:
        time.sleep(0.3)
    happens(mine.file)
    before = mine.file.read_bytes() if mine.file.exists() else None
    assert lost(mine)
    assert (mine.file.read_bytes() if mine.file.exists() else None) == before  # nor was it written
    TAKEN_OVER.clear()


def test_a_late_heart_beats_before_anything_is_written(mine: Owner) -> None:
    mine.beat = 0.01
    before = read_owner(mine.file)
    time.sleep(0.3)
    mine.require()
    after = read_owner(mine.file)
    assert before is not None
    assert after is not None
    assert after["beat"] == before["beat"] + 1


def test_a_heart_that_beats_between_the_last_look_and_the_takeover_keeps_its_file(mine: Owner, tmp_path: Path) -> None:
    seen = read_owner(mine.file)
    assert seen is not None
    mine._beat()
    Owner(mine.file)._remove(seen)  # whoever watched saw the beat before
    found = read_owner(mine.file)
    assert found is not None
    assert found["token"] == mine.me["token"]
    mine.require()  # beats if the last beat is long ago
    Owner(mine.file)._remove(read_owner(mine.file))  # and now nothing has changed since
    assert not mine.file.exists()


@pytest.mark.parametrize(
    "content", ["", "garbage", "[1]", '{"token": "x"}', '{"token": "x", "pid": "NaN"}', "\x00" * 40]
)
def test_a_damaged_owner_file_is_taken_over(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "owner.json"
    file.write_text(content)
    owner = Owner(file, beat=0.02, patience=0.2)
    owner.acquire()
    assert "damaged for 0.2 s" in capsys.readouterr().err
    owner.require()
    owner.release()
    assert not file.exists()


def test_everything_that_is_written_in_an_owned_folder_is_checked(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with owned(run):
        write_text(run.path / "a", "1")
        run.log({"step": 1})
        run.owner_file.unlink()
        for write in (
            lambda: write_text(run.path / "a", "2"),
            lambda: write_text(run.path / "deeper" / "b", "2"),
            lambda: run.log({"step": 2}),
            lambda: run.finish("{}"),
        ):
            with pytest.raises(OwnershipLost):
                write()
        write_text(tmp_path / "elsewhere", "x")
    assert (run.path / "a").read_text() == "1"
    assert len(run.log_file.read_text().splitlines()) == 1
    assert not run.is_finished
    TAKEN_OVER.clear()


def test_what_another_has_finished_is_not_written_again(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with owned(run):
        run.record_file.write_text("theirs")
        with pytest.raises(OwnershipLost, match="has been finished by another"):
            run.finish("mine")
    assert run.record_file.read_text() == "theirs"
    own = RunDirectory(tmp_path / "own")
    with owned(own):
        own.finish("mine")
        own.discard_checkpoints()
    with owned(own):
        write_text(own.record_file, "relabelled")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_folder_is_a_message(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir(mode=0o500)
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        Owner(folder / "run" / "owner.json").acquire()


def test_a_folder_that_cannot_be_written_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RunDirectoryError, match=r"run: cannot be written \(Permission denied\)"):
        Owner(tmp_path / "run" / "owner.json").acquire()


def test_a_lost_run_is_a_failure_of_exit_code_1() -> None:
    assert issubclass(OwnershipLost, RunFailure)
