"""SLURM's commands as shell scripts that note how they were called: the boundary for fast tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SCRIPTS = {
    "srun": "exit 1",
    "sbatch": """
n=$(( $(cat "$FAKE/count" 2>/dev/null || echo 0) + 1 )); echo $n > "$FAKE/count"
cp "$1" "$FAKE/submitted-$n.sh"
if [ "$n" = "$(cat "$FAKE/refuse" 2>/dev/null)" ]; then
  echo "sbatch: error: Batch job submission failed: $(cat "$FAKE/message")" >&2; exit 1
fi
echo "Submitted batch job $n"
""",
    "squeue": 'cat "$FAKE/queue" 2>/dev/null; exit 0',
    "sacct": 'cat "$FAKE/accounting" 2>/dev/null || { echo "Slurm accounting storage is disabled" >&2; exit 1; }',
    "scancel": 'echo "$@" >> "$FAKE/cancelled"',
    "scontrol": 'if [ "$2" = config ]; then echo "MaxArraySize            = ${FAKE_LIMIT:-1001}"; '
    'else cat "$FAKE/job" || exit 1; fi',
}


class FakeSlurm:
    """The scripts' folder: what they are told and what they were asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        for name, script in SCRIPTS.items():
            path = folder / name
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("FAKE", str(folder))

    def queue(self, **states: str) -> None:
        """``_1_0="RUNNING|None|n1|1:00"``: what squeue says of jobs, without the underscore in front."""
        lines = [f"{job.removeprefix('_')}|{state}" for job, state in states.items()]
        (self.folder / "queue").write_text("\n".join(lines) + "\n" * bool(lines))

    def refuse(self, number: int, message: str) -> None:
        """Let the n-th sbatch fail."""
        (self.folder / "refuse").write_text(str(number))
        (self.folder / "message").write_text(message)

    @property
    def submitted(self) -> list[str]:
        """The batch scripts, in order."""
        files = self.folder.glob("submitted-*.sh")
        return [file.read_text() for file in sorted(files, key=lambda file: int(file.stem.split("-")[1]))]

    @property
    def cancelled(self) -> list[str]:
        """The arguments of scancel."""
        file = self.folder / "cancelled"
        return file.read_text().split() if file.exists() else []


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "fake slurm", monkeypatch)
