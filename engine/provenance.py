"""The version of the running code: its commit and its uncommitted changes.

A frozen copy of the packages (see `launch.slurm.snapshot`) stores both in files; elsewhere they come from git.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

COMMIT_FILE = "COMMIT"
PATCH_FILE = "changes.patch"
CODE = ("mixmask", "engine", "pretrain", "transfer", "evaluate", "launch", "configs")  # may change a number


@dataclass(frozen=True)
class Code:
    """The state of the code.

    Attributes:
        commit: The commit hash, with ``+changes`` if there are uncommitted changes or untracked files, or ``+unknown``
            if git does not answer; None outside a checkout.
        patch: The uncommitted changes to tracked files, for ``git apply``; empty if there are none.
    """

    commit: str | None
    patch: bytes


@cache
def code() -> Code:
    """The state of the running code, cached at the first call."""
    root = Path(__file__).resolve().parents[1]  # of a checkout; elsewhere it is the package itself
    if not (root / "mixmask").is_dir():
        root = root.parent
    if (root / COMMIT_FILE).is_file():
        commit = (root / COMMIT_FILE).read_text(encoding="utf-8").strip()
        patch = root / PATCH_FILE
        return Code(commit or None, patch.read_bytes() if patch.is_file() else b"")
    here = Path(__file__).resolve()
    # Installed inside another project's checkout (in its .venv): that project's commit says nothing about this code.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return Code(None, b"")
    commit = (_git(root, "rev-parse", "HEAD") or b"").decode().strip()
    if not commit:
        return Code(None, b"")
    state = _git(root, "status", "--porcelain", "--", *CODE)
    changes = _git(root, "diff", "HEAD", "--binary", "--", *CODE) if state else b""
    if state is None or changes is None:
        return Code(f"{commit}+unknown", b"")
    return Code(f"{commit}+changes" if state else commit, changes)


def _git(folder: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
