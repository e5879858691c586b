"""One process at a time works in a run directory: an owner file with a heartbeat, and when it may be taken over.

The owner writes who it is and, every few seconds, that it still lives. Another process that wants the folder looks at that
file: if its owner has ended on this machine, or is an earlier start of the same cluster job, or its heartbeat has stopped
while it was watched, the folder is taken over; a heart that beats is left alone. No decision compares the clocks of
different machines.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.errors import RunDirectoryError
from engine.progress import say
from engine.storage import RunDirectory, write_text

BEAT_SECONDS = 15.0
PATIENCE_SECONDS = 120.0  # a heart that has not beaten for so long is dead

TAKEN_OVER = threading.Event()  # this process has slept so long that another one does its work


def cluster_job(environment: Mapping[str, str] = os.environ) -> str | None:
    """The SLURM job that this process belongs to, with its place in an array (``123_4``); None outside SLURM."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment.get('SLURM_ARRAY_TASK_ID', '0')}"
    return environment.get("SLURM_JOB_ID")


def _machine() -> str:
    """What a process id means something in: this start of this machine, and the namespace of processes (a container's)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}:{uuid.getnode()}"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_owner(file: Path) -> dict[str, Any] | None:
    """What an owner file says, or None without one (or while it changes hands)."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "token" in found else None


def describe_owner(owner: Mapping[str, Any]) -> str:
    """Who it is, in words."""
    job = f"job {owner['job']}, " if owner.get("job") else ""
    return f"{job}process {owner.get('pid')} of {owner.get('user')} on {owner.get('host')}"


def seems_alive(file: Path) -> bool:
    """Whether an owner file's owner lives, as far as one can see without waiting.

    On another machine than this one the age of its last heartbeat decides, by the file system's clock.
    """
    found = read_owner(file)
    if found is None:
        return False
    if found.get("machine") == _machine():
        return _lives(int(found["pid"]))
    try:
        return time.time() - file.stat().st_mtime < PATIENCE_SECONDS
    except OSError:
        return False


def _take_name(file: Path, name: Path) -> None:
    """Give a file a second name, unless something has it.

    Where the file system knows no links (exFAT, some network drives), a copy is made under that name; a reader may then find
    it empty for a moment, which counts as damaged and not as free.

    Raises:
        FileExistsError: If the name is taken.
    """
    try:
        os.link(file, name)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        content = file.read_bytes()
        with name.open("xb") as copy:
            copy.write(content)


class Owner:
    """The right to work on something, as a file that one process holds.

    Args:
        file: The owner file.
        beat: Seconds between two heartbeats.
        patience: Seconds without a heartbeat after which an owner counts as dead.
        wait: Seconds to wait for a living owner to finish.
    """

    def __init__(
        self, file: Path, beat: float = BEAT_SECONDS, patience: float = PATIENCE_SECONDS, wait: float = 0
    ) -> None:
        self.file, self.beat, self.patience, self.wait = file, beat, patience, wait
        self.me: dict[str, Any] = {
            "token": uuid.uuid4().hex,
            "user": getpass.getuser(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
            "job": cluster_job(),
            "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
            "beat": 0,
        }
        self.made_folder = False
        self.ended = threading.Event()
        self.heart: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the file, waiting if it must be seen whether its owner lives.

        Raises:
            RunDirectoryError: If its owner lives.
        """
        give_up = time.monotonic() + self.wait
        unreadable_since: float | None = None
        told = False
        while not self._create():
            found = read_owner(self.file)
            if found is None:  # released a moment ago, or not to be read
                unreadable_since = unreadable_since or time.monotonic()
                if time.monotonic() > unreadable_since + self.patience:
                    raise RunDirectoryError(f"{self.file}: cannot be read; if nobody works there, delete it")
                time.sleep(min(0.1, self.beat))
                continue
            unreadable_since = None
            if self._is_dead(found):
                self._remove(found)
                continue
            if not told:
                say(f"{self.file.parent}: waiting to see whether {describe_owner(found)} still works on it")
                told = True
            if self._beats(found) and time.monotonic() > give_up:
                raise RunDirectoryError(
                    f"{self.file.parent}: {describe_owner(found)} is working on it. One at a time: wait for it, or stop it"
                )
        TAKEN_OVER.clear()
        self.heart = threading.Thread(target=self._keep_beating, daemon=True)
        self.heart.start()

    def release(self) -> None:
        """Give the file up."""
        self.ended.set()
        if self.heart is not None:
            self.heart.join()
        if self._is_mine():
            self.file.unlink(missing_ok=True)
        if self.made_folder:
            with contextlib.suppress(OSError):  # work has been left in it
                self.file.parent.rmdir()

    def _create(self) -> bool:
        """Make the file with its content in one step; a link fails where the name is taken, also on NFS."""
        self.made_folder = self.made_folder or not self.file.parent.is_dir()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        draft = self.file.with_name(f".{self.file.name}.{self.me['token']}.tmp")
        try:
            draft.write_text(json.dumps(self.me), encoding="utf-8")
            _take_name(draft, self.file)
        except FileExistsError:
            return False
        except FileNotFoundError:  # a releasing process has just removed the folder that it had made
            return False
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _is_dead(self, found: Mapping[str, Any]) -> bool:
        if found.get("job") is not None and found["job"] == self.me["job"] and found["restart"] != self.me["restart"]:
            return True  # SLURM does not start a job again while it runs
        if found.get("machine") == self.me["machine"]:
            return found["pid"] == self.me["pid"] or not _lives(int(found["pid"]))
        return False

    def _beats(self, found: Mapping[str, Any]) -> bool:
        """Watch a heart; forget its owner if it stays still."""
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            time.sleep(min(1.0, self.beat))
            now = read_owner(self.file)
            if now is None or now["token"] != found["token"]:
                return False  # it has ended, or another one was faster: look again
            if now["beat"] != found["beat"]:
                return True
        say(f"{self.file.parent}: {describe_owner(found)} has not been heard of for {self.patience:g} s; taking over")
        self._remove(found)
        return False

    def _remove(self, dead: Mapping[str, Any]) -> None:
        """Take a dead owner's file away; of several who try, one does, and a living owner's file is put back."""
        grave = self.file.with_name(f".{self.file.name}.{uuid.uuid4().hex}.tmp")
        try:
            os.rename(self.file, grave)
        except FileNotFoundError:
            return
        buried = read_owner(grave)
        if buried is not None and buried["token"] != dead["token"]:
            with contextlib.suppress(FileExistsError):
                _take_name(grave, self.file)
        grave.unlink()

    def _is_mine(self) -> bool:
        found = read_owner(self.file)
        return found is not None and found["token"] == self.me["token"]

    def _keep_beating(self) -> None:
        while not self.ended.wait(self.beat):
            if read_owner(self.file) is not None and not self._is_mine():  # this process slept, and was taken for dead
                say(f"{self.file.parent}: another process has taken over; stopping")
                TAKEN_OVER.set()
                os.kill(os.getpid(), signal.SIGTERM)
                return
            self.me["beat"] += 1
            with contextlib.suppress(OSError):  # a full or vanished disk stops the run itself
                write_text(self.file, json.dumps(self.me))


@contextlib.contextmanager
def owned(run: RunDirectory) -> Iterator[None]:
    """Work in a run directory while nobody else does; of several processes the first one holds it.

    Raises:
        RunDirectoryError: If another living process works in it.
    """
    from engine import distributed  # and with it torch, which `mixmask status` does without

    owner = Owner(run.owner_file)
    distributed.first_only(owner.acquire)
    try:
        yield
    finally:
        if distributed.world().is_writer:
            owner.release()
