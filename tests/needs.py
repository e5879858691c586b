"""Tests of what may not be installed are skipped with a reason; where they are demanded, they fail instead."""

from __future__ import annotations

import os
import shutil

import pytest


def need(found: bool, what: str, packages: str, demanded: str) -> None:
    """Skip the test, or fail if the environment variable ``demanded`` is set, unless ``what`` was found."""
    if found:
        return
    if os.environ.get(demanded):
        pytest.fail(f"{demanded} is set, and there is no {what}")
    pytest.skip(f"no {what} on this machine: {packages}")


def needed_browser() -> str:
    """The program of a Chromium."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    need(found is not None, "chromium", "apt-get install chromium", "MIXMASK_REQUIRE_BROWSER")
    assert found is not None
    return found
