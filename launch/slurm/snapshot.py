"""A frozen copy of the code that jobs import, so that editing the checkout does not change what is queued."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import mixmask
from mixmask.engine.builtin_configs import configs_folder
from mixmask.engine.provenance import COMMIT_FILE, PATCH_FILE, code


def freeze(folder: Path) -> Path:
    """Copy the packages and the configs into ``folder``, unless the same code lies there already.

    Returns:
        The copy: the package, ``COMMIT`` and, with uncommitted changes, ``changes.patch``.
    """
    package = Path(mixmask.__file__).parent
    files: dict[Path, Path] = {}
    for place, folders, names in os.walk(package, followlinks=True):  # in a checkout the five packages are links
        folders[:] = [name for name in folders if name != "__pycache__"]
        files |= {Path("mixmask", os.path.relpath(place, package), name): Path(place, name) for name in names}
    configs = configs_folder()
    files |= {Path("mixmask", "configs", path.relative_to(configs)): path for path in configs.rglob("*.yaml")}
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
    draft.chmod(0o755)  # mkdtemp makes folders that only their owner can read
    try:
        # Renamed in one step, so that no job can import a copy that is not complete.
        os.rename(draft, target)
    except OSError:  # another launch was faster
        shutil.rmtree(draft)
    return target
