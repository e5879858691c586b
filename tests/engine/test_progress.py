from __future__ import annotations

import pytest

from mixmask.engine import progress
from mixmask.engine.progress import StepProgress, track


def test_plain_lines_off_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with StepProgress("run", total=12, first=2, images_per_step=8) as bar:
        for _ in range(10):
            bar.advance("loss 1.000")
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) < 10
    assert all(line.startswith("run: step ") and "images/s" in line and "s left" in line for line in lines)
    assert lines[-1].startswith("run: step 12/12, loss 1.000")


def test_short_passes_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track("features", "abc", 3, 1)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_pass_inside_another_ones_step_does_not_start_a_second_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with StepProgress("outer", 2, 0, 1) as outer:
        assert outer.bar is not None
        with StepProgress("inner", 2, 0, 1) as inner:
            assert inner.bar is None
            inner.advance()
        outer.advance()
    with StepProgress("next", 1, 0, 1) as after:
        assert after.bar is not None
