"""A frozen copy of the code that jobs import, so that editing the checkout does not change what is queued."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from engine.provenance import COMMIT_FILE, PATCH_FILE, code
from launch.builtin import configs_folder

PACKAGES = ("engine", "pretrain", "transfer", "evaluate", "launch")


def freeze(folder: Path) -> Path:
    """Copy the packages and the configs into ``folder``, unless the same code lies there already.

    Returns:
        The copy: the packages, ``COMMIT`` and, with uncommitted changes, ``changes.patch``.
    """
    root = Path(__file__).resolve().parents[1]
    files = {path.relative_to(root): path for name in PACKAGES for path in sorted((root / name).rglob("*"))}
    configs = configs_folder()
    files |= {Path("configs") / path.relative_to(configs): path for path in sorted(configs.rglob("*.yaml"))}
    files = {name: path for name, path in files.items() if path.is_file() and "__pycache__" not in name.parts}
    state = code()
    digest = hashlib.sha256(f"{state.commit}\n".encode() + state.patch)
    for name, path in sorted(files.items()):
        digest.update(f"{name}\n".encode() + path.read_bytes())
    target = folder / digest.hexdigest()[:12]
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder, prefix=".draft-"))
    for name, path in files.items():
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, draft / name)
    (draft / COMMIT_FILE).write_text(f"{state.commit or ''}\n", encoding="utf-8")
    if state.patch:
        (draft / PATCH_FILE).write_bytes(state.patch)
    draft.chmod(0o755)
    try:
        os.rename(draft, target)
    except OSError:  # another launch was faster
        shutil.rmtree(draft)
    return target
