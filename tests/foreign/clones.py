"""Other projects' code, run beside ours when clones are given: MIXMASK_FOREIGN names the folder of the clones.

Nothing of them is copied into this project.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest


def clone(*names: str) -> Path:
    """The clone of a project, by one of its usual folder names; the test is skipped without one."""
    folder = os.environ.get("MIXMASK_FOREIGN")
    found = (
        None
        if folder is None
        else next((Path(folder) / name for name in names if (Path(folder) / name).is_dir()), None)
    )
    if found is None:
        pytest.skip(f"MIXMASK_FOREIGN names no folder with a clone of {names[0]}", allow_module_level=True)
    return found


def module_of(file: Path, stand_ins: dict[str, ModuleType] | None = None) -> ModuleType:
    """One file of a clone as a module, without its package; ``stand_ins`` are the modules that it imports from there."""
    name = f"foreign_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = {key: sys.modules.get(key) for key in stand_ins or {}}
    sys.modules.update(stand_ins or {})
    try:
        spec.loader.exec_module(module)
    finally:
        for key, value in before.items():
            if value is None:
                del sys.modules[key]
            else:
                sys.modules[key] = value
    return module
