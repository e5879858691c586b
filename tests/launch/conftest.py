"""A SLURM for the tests of `launch`: skipped with the reason where it is not installed, unless it is demanded."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.slurm import Slurm, missing, running_slurm
from tests.needs import need

DEMANDED = "MIXMASK_REQUIRE_SLURM"


def _require(accounting: bool) -> None:
    absent = missing(accounting)
    packages = "slurm-wlm munge" + " slurmdbd mariadb-server" * accounting
    need(not absent, f"complete SLURM ({', '.join(absent)} not found)", f"apt-get install {packages}", DEMANDED)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Slurm]:
    """Two nodes, no accounting."""
    _require(accounting=False)
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with running_slurm(root) as running:
            yield running
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def slurm(cluster: Slurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """The cluster, for one test: its commands are found, and its queue is empty afterwards."""
    with cluster.used(monkeypatch):
        yield cluster


@pytest.fixture
def slurm_that_loses_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """A cluster of its own, in which a node that does not answer is soon down."""
    _require(accounting=False)
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with running_slurm(root, slurmd_timeout=6) as running, running.used(monkeypatch):
            yield running
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def slurm_with_accounting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """A cluster of its own with a database, whose queue forgets a job within seconds."""
    _require(accounting=True)
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with running_slurm(root, accounting=True, min_job_age=2) as running, running.used(monkeypatch):
            yield running
    finally:
        shutil.rmtree(root, ignore_errors=True)
