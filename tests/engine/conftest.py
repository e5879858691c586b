"""The containers that several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.containers import CONTAINERS


@pytest.fixture(scope="session")
def made(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shapes in every container, by the container's name."""
    out = tmp_path_factory.mktemp("containers")
    return {name: make(shapes, out / name) for name, make in CONTAINERS.items()}
