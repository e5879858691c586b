"""Which code runs: in a checkout, with uncommitted changes, outside one, and in a frozen copy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.processes import ROOT

ASK = (
    "from mixmask import engine; from mixmask.engine.provenance import code; "
    "c = code(); print(engine.__file__, c.commit, len(c.patch))"
)


def ask(folder: Path) -> list[str]:
    done = subprocess.run([sys.executable, "-c", ASK], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.split()


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def copy(folder: Path) -> Path:
    for name in ("mixmask", "engine"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(ROOT) / name, folder / name, symlinks=True, ignore=ignored)
    return folder


def test_commit_and_changes_of_a_checkout(tmp_path: Path) -> None:
    checkout = copy(tmp_path / "checkout")
    assert ask(checkout)[1:] == ["None", "0"]
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first")
    commit = git(checkout, "rev-parse", "HEAD")
    assert ask(checkout)[1:] == [commit, "0"]
    with (checkout / "engine" / "errors.py").open("a") as file:
        file.write("# changed\n")
    where, state, length = ask(checkout)
    assert where.startswith(str(checkout))
    assert state == f"{commit}+changes"
    assert int(length) > 0


def test_a_copy_inside_another_checkout_is_not_its_code(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    inner = copy(tmp_path / "site-packages")
    assert ask(inner)[1:] == ["None", "0"]


def test_a_frozen_copy_says_what_it_was_made_from(tmp_path: Path) -> None:
    frozen = copy(tmp_path / "frozen")
    (frozen / "COMMIT").write_text("abc+changes\n")
    (frozen / "changes.patch").write_bytes(b"diff")
    assert ask(frozen)[1:] == ["abc+changes", "4"]
