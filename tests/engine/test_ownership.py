"""One process at a time in a run directory: who counts as alive, who is taken over, and races between takers."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from mixmask.engine.errors import RunDirectoryError
from mixmask.engine.ownership import TAKEN_OVER, Owner, cluster_job, describe_owner, owned, read_owner, seems_alive
from mixmask.engine.storage import RunDirectory
from tests import zygote

pytestmark = pytest.mark.xdist_group("zygote")  # one worker: each would start a zygote of its own

HOLD = """
import sys, time
from pathlib import Path
from mixmask.engine.ownership import Owner
owner = Owner(Path(sys.argv[1]), beat=0.1)
owner.acquire()
print("holding", flush=True)
time.sleep(60)
"""


def holder(file: Path) -> zygote.Started:
    """Another process that owns the file."""
    started = zygote.start(["-c", HOLD, str(file)])
    assert started.stdout.readline() == "holding\n"
    return started


def write_foreign(file: Path, **changes: object) -> None:
    """An owner file of another machine."""
    owner = {**Owner(file).me, "machine": "another boot", "host": "n7", "pid": 12, "token": "theirs", **changes}
    file.write_text(json.dumps(owner))


@pytest.mark.slow
def test_a_living_owner_is_left_alone_and_named(tmp_path: Path) -> None:
    file = tmp_path / "owner.json"
    other = holder(file)
    try:
        assert seems_alive(file)
        with pytest.raises(RunDirectoryError, match=f"process {other.pid} of .* is working on it"):
            Owner(file, beat=0.1, patience=20).acquire()
        found = read_owner(file)
        assert found is not None
        assert found["pid"] == other.pid
    finally:
        other.kill()
        other.wait()


@pytest.mark.slow
def test_a_killed_owner_on_this_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    file = tmp_path / "owner.json"
    other = holder(file)
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert not seems_alive(file)
    mine = Owner(file, patience=60)
    started = time.monotonic()
    mine.acquire()
    assert time.monotonic() - started < 5
    found = read_owner(file)
    assert found is not None
    assert found["pid"] == os.getpid()
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_the_heart_of_another_machine_is_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "owner.json"
    write_foreign(file, beat=3)
    still = Owner(file, beat=0.05, patience=0.3)
    still.acquire()
    assert "has not been heard of for 0.3 s; taking over" in capsys.readouterr().err
    still.release()

    write_foreign(file, beat=3)
    beating = threading.Timer(0.3, lambda: write_foreign(file, beat=4))
    beating.start()
    with pytest.raises(RunDirectoryError, match="on n7 is working on it"):
        Owner(file, beat=0.05, patience=20).acquire()
    beating.join()


def test_an_earlier_start_of_the_same_job_is_watched_and_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After NODE_FAIL the first start may live on: its node has lost the cluster, not the file system."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert cluster_job() == "12_3"
    file = tmp_path / "owner.json"
    write_foreign(file, job="12_3", restart="0")
    beats = [
        threading.Timer(0.15 * n, lambda n=n: write_foreign(file, job="12_3", restart="0", beat=n)) for n in (1, 2, 3)
    ]
    for timer in beats:
        timer.start()
    mine = Owner(file, beat=0.02, patience=0.4)
    started = time.monotonic()
    mine.acquire()  # after the last beat and the patience
    assert time.monotonic() - started > 0.45 + 0.35
    assert "job 12_3, process" in describe_owner(mine.me)
    mine.release()
    write_foreign(file, job="12_3", restart="1")  # two commands in one interactive job
    threading.Timer(0.2, lambda: write_foreign(file, job="12_3", restart="1", beat=9)).start()
    with pytest.raises(RunDirectoryError, match="job 12_3"):
        Owner(file, beat=0.05, patience=20).acquire()


NO_LINKS = """
import errno, os
def refuse(*names):
    raise OSError(errno.EPERM, "Operation not permitted")
os.link = refuse
"""


@pytest.mark.slow
@pytest.mark.parametrize("world", ["", NO_LINKS], ids=["links", "a file system without links"])
def test_of_many_who_take_over_at_once_one_wins_at_a_time(world: str, tmp_path: Path) -> None:
    file = tmp_path / "owner.json"
    write_foreign(file, machine=Owner(file).me["machine"], pid=2**22 + 1)  # a process that does not exist
    program = (
        f"{world}\n"
        + """
import sys, time
from pathlib import Path
from mixmask.engine.ownership import Owner
folder = Path(sys.argv[1])
for _ in range(8):
    owner = Owner(folder / "owner.json", beat=0.05, wait=60)
    owner.acquire()
    (folder / "inside").mkdir()  # fails if another one is inside
    time.sleep(0.01)
    (folder / "inside").rmdir()
    owner.release()
"""
    )
    several = [zygote.start(["-c", program, str(tmp_path)]) for _ in range(3)]
    texts = [process.communicate(timeout=120)[1] for process in several]
    assert [process.returncode for process in several] == [0, 0, 0], texts
    assert not file.exists()


def test_a_process_that_has_been_taken_over_is_told_to_stop(tmp_path: Path) -> None:
    told = []
    before = signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    try:
        mine = Owner(tmp_path / "owner.json", beat=0.05)
        mine.acquire()
        write_foreign(tmp_path / "owner.json")
        end = time.monotonic() + 10
        while not told and time.monotonic() < end:
            time.sleep(0.02)
        assert told
        mine.release()
        assert (tmp_path / "owner.json").exists()  # the other one's
        assert TAKEN_OVER.is_set()
    finally:
        TAKEN_OVER.clear()
        signal.signal(signal.SIGTERM, before)


def test_the_folder_is_free_after_a_failure(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    seen = []

    def fail() -> None:
        with owned(run):
            seen.append(run.owner_file.exists())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [True]
    assert not run.path.exists()  # it was made for the owner file alone
