"""A framework that several tests take."""

from __future__ import annotations

import pytest

from mixmask.pretrain.frameworks.moco import MoCo
from tests.pretrain.small_frameworks import build


@pytest.fixture
def moco() -> MoCo:
    framework = build("moco")
    assert isinstance(framework, MoCo)
    return framework
