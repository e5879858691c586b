"""A framework and a recipe that several tests take."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixmask.pretrain.frameworks.moco.network import MoCo
from tests.pretrain.small_frameworks import build
from tests.pretrain.small_runs import CONFIG


@pytest.fixture
def moco() -> MoCo:
    framework = build("moco")
    assert isinstance(framework, MoCo)
    return framework


@pytest.fixture
def config(shapes: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.replace("ROOT", str(shapes)))
    return path
