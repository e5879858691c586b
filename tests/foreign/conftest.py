"""Markers that other projects' tests carry."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "DDP: lightly's mark of tests that start several processes")
