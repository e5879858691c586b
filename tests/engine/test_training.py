from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixmask.engine import distributed, training
from mixmask.engine.checkpoint import read_checkpoint
from mixmask.engine.errors import Interrupted, RunFailure
from mixmask.engine.job import Job, Part
from mixmask.engine.stopping import StopSignals
from mixmask.engine.storage import RunDirectory
from mixmask.engine.training import train

CPU = torch.device("cpu")


class Recorder:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def log(self, step: int, values: Any) -> None:
        self.lines.append((step, dict(values)))

    def close(self) -> None:
        self.closed = True


def job(path: Path, **changes: Any) -> Job:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    path.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "title": "job",
        "run": RunDirectory(path),
        "fingerprint": "f",
        "data": {},
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "schedule": lambda step: 1 / (1 + step),
        "num_steps": 10,
        "images_per_step": 8,
        "device": CPU,
        "seed": 0,
        "log_every": 2,
        "checkpoint_every": 4,
        **changes,
    }
    return Job(**settings)


def batches(first: int) -> Iterator[Tensor]:
    for step in range(first, 100):
        yield torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


def error_of(model: nn.Module, rows: Tensor) -> Tensor:
    square: Tensor = (model(rows) - rows.sum(1, keepdim=True)).square().mean()
    return square


def run(
    job: Job, parts: int = 1, stop_at: int | None = None, signals: Sequence[int] = (signal.SIGTERM,)
) -> dict[str, float]:
    def losses(batch: Tensor, step: int) -> list[Part]:
        if step == stop_at:
            for number in signals:
                os.kill(os.getpid(), number)
        return [lambda rows=rows: {"loss": error_of(job.model, rows) / parts} for rows in batch.chunk(parts)]

    return train(job, batches, losses)


def weights(job: Job) -> list[float]:
    return [value for parameter in job.model.parameters() for value in parameter.flatten().tolist()]


def log(job: Job) -> list[dict[str, float]]:
    return [json.loads(line) for line in job.run.log_file.read_text().splitlines()]


def test_gradients_of_parts_add_up_to_the_whole_batchs(tmp_path: Path) -> None:
    whole, parts = job(tmp_path / "whole"), job(tmp_path / "parts")
    run(whole)
    run(parts, parts=4)
    assert weights(parts) == pytest.approx(weights(whole), abs=1e-6)
    assert [line["loss"] for line in log(parts)] == pytest.approx([line["loss"] for line in log(whole)], abs=1e-6)


@pytest.mark.parametrize("step", [0, 3, 8])
def test_a_signal_stops_at_the_step_boundary_and_the_run_goes_on(tmp_path: Path, step: int) -> None:
    whole, broken = job(tmp_path / "whole"), job(tmp_path / "broken")
    run(whole)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=rf"stopped at step {step + 1} of 10 by SIGTERM; the same command resumes"):
        run(broken, stop_at=step)
    assert signal.getsignal(signal.SIGTERM) is before
    assert read_checkpoint(broken.run.checkpoint_file)["step"] == step + 1
    again = job(tmp_path / "broken")
    run(again)
    assert weights(again) == weights(whole)
    assert [line["loss"] for line in log(again)] == [line["loss"] for line in log(whole)]


@pytest.fixture
def heard_ctrl_c() -> Iterator[None]:
    """Tests may run where Ctrl-C is ignored, as in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_a_stop_signal_and_the_second_one_ends_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], heard_ctrl_c: None
) -> None:
    whole, broken = job(tmp_path / "whole"), job(tmp_path / "broken")
    run(whole)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"stopped at step 4 of 10 by SIGINT; the same command resumes"):
        run(broken, stop_at=3, signals=[signal.SIGINT])
    assert "Ctrl-C again quits at once" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path / "broken"), stop_at=6, signals=[signal.SIGINT, signal.SIGINT])
    assert signal.getsignal(signal.SIGINT) is before
    assert read_checkpoint(broken.run.checkpoint_file)["step"] == 4
    again = job(tmp_path / "broken")
    run(again)
    assert weights(again) == weights(whole)


def test_what_ignores_ctrl_c_goes_on_ignoring_it(tmp_path: Path) -> None:
    """As a process that its parent, and not the terminal, tells to stop."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run(job(tmp_path / "run"), stop_at=3, signals=[signal.SIGINT])
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_last_step_has_a_checkpoint_before_anything_else_is_done(tmp_path: Path) -> None:
    """What comes after training (a test) may take long; a stop in it must cost no training."""
    whole, broken = job(tmp_path / "whole"), job(tmp_path / "broken")
    run(whole)
    run(broken)
    assert read_checkpoint(broken.run.checkpoint_file)["step"] == 10
    again = job(tmp_path / "broken")

    def no_batches(first: int) -> Iterator[Tensor]:
        assert first == 10
        yield from ()

    train(again, no_batches, lambda batch, step: [])
    assert weights(again) == weights(whole)

    def stopped() -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    settings = {"evaluate_every": 10, "evaluate": stopped}
    child = os.fork()
    if not child:
        run(job(tmp_path / "killed", **settings))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    found = train(
        job(tmp_path / "killed", evaluate_every=10, evaluate=lambda: {"knn/top1": 1.0}), no_batches, lambda b, s: []
    )
    assert found["knn/top1"] == 1.0


@pytest.mark.parametrize("when", [5, 10])
def test_a_signal_does_not_wait_for_the_end_of_an_evaluation(tmp_path: Path, when: int) -> None:
    calls: list[int] = []

    def evaluate() -> dict[str, float]:
        calls.append(1)
        if len(calls) == when // 5:
            os.kill(os.getpid(), signal.SIGUSR2)
            raise AssertionError("the evaluation went on")
        return {"knn/top1": 50.0}

    settings = {"evaluate_every": 5, "evaluate": evaluate}
    with pytest.raises(Interrupted, match=rf"stopped at step {when} of 10 by SIGUSR2"):
        run(job(tmp_path / "broken", **settings))
    assert read_checkpoint(tmp_path / "broken" / "checkpoint.pt")["step"] == when
    calls.extend([1] * 5)
    again, whole = job(tmp_path / "broken", **settings), job(tmp_path / "whole", **settings)
    assert run(again)["knn/top1"] == 50.0
    run(whole)
    assert weights(again) == weights(whole)
    kept = [
        [{key: line[key] for key in ("step", "loss", "knn/top1") if key in line} for line in log(one)]
        for one in (again, whole)
    ]
    assert kept[0] == kept[1]


def test_a_signal_in_the_last_step_lets_the_run_finish(tmp_path: Path) -> None:
    last = job(tmp_path)
    run(last, stop_at=9)
    assert log(last)[-1]["step"] == 10


def test_fp16_scales_its_gradients_and_resumes(tmp_path: Path) -> None:
    whole, broken = (job(tmp_path / name, precision="fp16") for name in ("whole", "broken"))
    run(whole)
    with pytest.raises(Interrupted):
        run(broken, stop_at=4)
    assert read_checkpoint(broken.run.checkpoint_file)["scaler"]["scale"] > 1
    again = job(tmp_path / "broken", precision="fp16")
    run(again)
    assert weights(again) == weights(whole)
    assert log(whole)[-1]["loss"] < 0.5 * log(whole)[0]["loss"]


def test_gradients_are_clipped(tmp_path: Path) -> None:
    clipped = job(tmp_path, num_steps=1, clip_norm=1e-3, schedule=lambda step: 1)
    start = torch.tensor(weights(clipped))
    run(clipped)
    assert float((torch.tensor(weights(clipped)) - start).norm()) == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_a_group_can_keep_its_rate(tmp_path: Path) -> None:
    both = job(tmp_path, schedule=lambda step: 0.0)
    weight, bias = both.model.parameters()
    both.optimizer = torch.optim.SGD([{"params": [weight]}, {"params": [bias], "fixed_lr": True}], lr=0.1)
    both.__post_init__()
    start = weight.detach().clone(), bias.detach().clone()
    run(both)
    assert torch.equal(weight, start[0])
    assert not torch.equal(bias, start[1])


def test_what_moves_after_a_step_and_what_draws_are_deterministic(tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []

    def after(step: int) -> None:
        seen.append((step, float(torch.rand(()))))

    run(job(tmp_path / "a", after_step=after))
    first, seen[:] = list(seen), []
    with pytest.raises(Interrupted):
        run(job(tmp_path / "b", after_step=after), stop_at=5)
    run(job(tmp_path / "b", after_step=after))
    assert seen == first
    assert [step for step, _ in seen] == list(range(10))


def test_sinks_get_every_line_and_are_closed_whatever_happens(tmp_path: Path) -> None:
    recorder, starts = Recorder(), []

    def open_sinks(first: int) -> list[Recorder]:
        starts.append(first)
        return [recorder]

    whole = job(tmp_path, open_sinks=open_sinks, evaluate=lambda: {"knn/top1": 50.0}, evaluate_every=5)
    with pytest.raises(Interrupted):
        run(whole, stop_at=5)
    assert recorder.closed
    run(job(tmp_path, open_sinks=open_sinks, evaluate=lambda: {"knn/top1": 50.0}, evaluate_every=5))
    assert starts == [0, 6]
    assert [(step, {"step": step, "of": whole.num_steps, **values}) for step, values in recorder.lines] == [
        (line["step"], line) for line in log(whole)
    ]


def test_a_warning_is_said_and_does_not_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(job(tmp_path, watch=lambda line, step: "odd" if step == 4 and line["loss"] > 0 else None))
    assert capsys.readouterr().err.count("job: step 4: warning: odd") == 1


def test_weights_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    bad = job(tmp_path)

    def losses(batch: Tensor, step: int) -> list[Part]:
        def part() -> dict[str, Tensor]:
            loss = error_of(bad.model, batch)
            return {"loss": loss + steep(bad.model) if step == 7 else loss}

        return [part]

    with pytest.raises(RunFailure, match=r"weights that are not finite after step 7 \(weight"):
        train(bad, batches, losses)
    kept = read_checkpoint(bad.run.checkpoint_file)
    assert kept["step"] == 4
    assert all(torch.isfinite(value).all() for value in kept["model"].values())


class Steep(torch.autograd.Function):
    """Zero, with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.sum() * 0

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return torch.full((1, 4), torch.inf)


def steep(model: Any) -> Tensor:
    zero: Tensor = Steep.apply(model.weight)
    return zero


DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.engine.test_training import job, run
from mixmask.engine.errors import RunFailure

run_of = job(Path(sys.argv[1]), checkpoint_every=4)
good = run_of.run.checkpoint_file

def after(step):
    if step == 5:  # one checkpoint has been written; from now on no file may grow beyond 100 bytes
        import signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

run_of.after_step = after
run_of.log_every = 1000
run_of.num_steps = 1000
try:
    run(run_of)
except RunFailure as error:
    print(error)
    sys.exit(1)
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: both fail in the write itself."""
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", DISK, str(tmp_path / "run"), root],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "cannot write" in done.stdout
    assert "File too large" in done.stdout
    assert "The checkpoint before it is untouched" in done.stdout
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 4
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".tmp")]


def test_several_processes_leave_an_evaluation_to_whoever_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: theirs.append(number))
    monkeypatch.setattr(distributed, "_world", distributed.World(0, 2, 0))
    try:
        with StopSignals() as stop:
            with stop.at_once():
                signal.raise_signal(signal.SIGUSR2)
            assert (theirs, stop.received) == ([signal.SIGUSR2], [])
            signal.raise_signal(signal.SIGUSR2)
            assert (theirs, stop.received) == ([signal.SIGUSR2], [signal.SIGUSR2])
        signal.raise_signal(signal.SIGUSR2)
        assert len(theirs) == 2
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.mark.parametrize("evaluated", [False, True])
def test_the_last_step_is_saved_once(evaluated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    monkeypatch.setattr(training, "save", lambda job, reached: saved.append((reached.step, reached.to_evaluate)))
    settings = {"evaluate_every": 10, "evaluate": lambda: {"knn/top1": 1.0}} if evaluated else {}
    run(job(tmp_path / "run", checkpoint_every=100, **settings))
    assert saved == [(10, evaluated)]
