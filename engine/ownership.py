"""One process at a time works in a run directory: an owner file with a heartbeat, and when it may be taken over.

The owner writes who it is and, every few seconds, that it still lives. Another process that wants the folder looks at that
file: if its owner has ended on this machine, or its heartbeat has stopped while it was watched, the folder is taken over; a
heart that beats is left alone. No decision compares the clocks of different machines.

An owner may be taken for dead and live: it was stopped (SIGSTOP, a suspended machine), or its node lost the cluster and
not the file system. So before everything that it writes, the owner looks at the file again (`Owner.require`): if the file is
gone or another's, nothing more is written. If its own heart has been silent for long, it beats once and waits until whoever
may be taking over has seen that. A heartbeat changes the owner's own file in place and never makes one, so that it cannot
undo a takeover.
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

from mixmask.engine.errors import NotWritable, OwnershipLost, RunDirectoryError
from mixmask.engine.progress import say
from mixmask.engine.storage import RunDirectory, guarded

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
    """What an owner file says; None without one, and of one that is empty or damaged."""
    try:
        return _parsed(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    kinds = {"token": str, "pid": int, "machine": str, "beat": int, "restart": str}
    if not isinstance(found, dict) or not all(isinstance(found.get(key), kind) for key, kind in kinds.items()):
        return None
    return found if isinstance(found.get("job"), str | None) and 0 < found["pid"] < 2**31 else None


def _clock() -> float:
    """Seconds that go on while this process, or the whole machine, sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


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
        self.lost = False
        self.last_beat = _clock()
        self.lock = threading.Lock()  # the heart and the guard read and write the file
        self.ended = threading.Event()
        self.heart: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the file, waiting if it must be seen whether its owner lives.

        An earlier start of this very cluster job that still lives is waited for, however long: its node was lost to the
        cluster and not to the file system, and this start has nothing else to do.

        Raises:
            RunDirectoryError: If its owner lives, or the folder cannot be written.
        """
        give_up = time.monotonic() + self.wait
        unreadable_since: float | None = None
        told = False
        while not self._created():
            found = read_owner(self.file)
            if found is None:  # released a moment ago, or damaged
                unreadable_since = unreadable_since or time.monotonic()
                if time.monotonic() > unreadable_since + self.patience:
                    say(f"{self.file}: damaged for {self.patience:g} s, so it belongs to nobody; taking over")
                    self._remove(None)
                    unreadable_since = None
                time.sleep(min(0.1, self.beat))
                continue
            unreadable_since = None
            if self._is_dead(found):
                self._remove(found)
                continue
            if not told:
                say(f"{self.file.parent}: waiting to see whether {describe_owner(found)} still works on it")
                told = True
            mine = (
                found["job"] is not None and found["job"] == self.me["job"] and found["restart"] != self.me["restart"]
            )
            if self._beats(found) and time.monotonic() > give_up and not mine:
                raise RunDirectoryError(
                    f"{self.file.parent}: {describe_owner(found)} is working on it. One at a time: wait for it, or stop it"
                )
        TAKEN_OVER.clear()
        self.last_beat = _clock()
        self.heart = threading.Thread(target=self._keep_beating, daemon=True)
        self.heart.start()

    def release(self) -> None:
        """Give the file up."""
        self.ended.set()
        if self.heart is not None:
            self.heart.join()
        if not self.lost and self._is_mine():
            self.file.unlink(missing_ok=True)
        if self.made_folder:
            with contextlib.suppress(OSError):  # work has been left in it
                self.file.parent.rmdir()

    def require(self) -> None:
        """Make sure that this process still is the owner; called before everything that is written.

        Raises:
            OwnershipLost: If the file is gone or another's, now or at any time before.
        """
        with self.lock:
            if self.lost or not self._holds():
                self._lose()
                there = self.file.parent.is_dir()
                why = "another process works there now, or has finished it" if there else "the folder was deleted"
                raise OwnershipLost(
                    f"{self.file.parent}: no longer this process's ({why}); it stops, and nothing more was written"
                )

    def _holds(self) -> bool:
        if _clock() - self.last_beat <= self.patience / 2:
            return self._is_mine()
        # The heart has been silent so long that somebody may be taking over right now. A beat undoes that, if it comes in
        # time; whoever watches looks once a second.
        if not self._beat():
            return False
        time.sleep(2 * min(1.0, self.beat))
        return self._is_mine()

    def _lose(self) -> None:
        if not self.lost:
            self.lost = True
            TAKEN_OVER.set()

    def _created(self) -> bool:
        try:
            return self._create()
        except OSError as error:
            raise NotWritable(
                f"{self.file.parent}: cannot be written ({error.strerror or error}); name another run directory or folder "
                f"of runs"
            ) from None

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

    def _remove(self, dead: Mapping[str, Any] | None) -> None:
        """Take a dead owner's file away (None: a damaged one); of several who try, one does.

        A file that is another owner's by now, or in which the heart has beaten since it was last looked at, is put back.
        """
        grave = self.file.with_name(f".{self.file.name}.{uuid.uuid4().hex}.tmp")
        try:
            os.rename(self.file, grave)
        except FileNotFoundError:
            return
        buried = read_owner(grave)
        seen = None if dead is None else (dead["token"], dead["beat"])
        if buried is not None and (buried["token"], buried["beat"]) != seen:
            with contextlib.suppress(FileExistsError):
                _take_name(grave, self.file)
        grave.unlink()

    def _is_mine(self) -> bool:
        found = read_owner(self.file)
        return found is not None and found["token"] == self.me["token"]

    def _beat(self) -> bool:
        """Count one up in the file, in place; False if the file is not this process's."""
        try:
            with self.file.open("r+", encoding="utf-8") as file:
                found = _parsed(file.read())
                if found is None or found["token"] != self.me["token"]:
                    return False
                self.me["beat"] += 1
                file.seek(0)
                file.write(json.dumps(self.me))
                file.truncate()
        except FileNotFoundError:
            return False
        except OSError:  # a full or vanished disk: the heart is late, and what is written next asks again
            return True
        self.last_beat = _clock()
        return True

    def _keep_beating(self) -> None:
        while not self.ended.wait(self.beat):
            with self.lock:
                if self.lost:
                    return
                if not self._beat():  # this process slept, and was taken for dead; or the folder is gone
                    self._lose()
            if self.lost:
                say(f"{self.file.parent}: another process has taken over, or the folder is gone; stopping")
                if (
                    signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
                ):  # the loop's; else what is written next ends it
                    os.kill(os.getpid(), signal.SIGTERM)
                return


@contextlib.contextmanager
def owned(run: RunDirectory) -> Iterator[None]:
    """Work in a run directory while nobody else does; of several processes the first one holds it.

    Until the end of the context, whatever is written there is checked: the owner file must be this process's, and the run
    must not have been finished by another.

    Raises:
        RunDirectoryError: If another living process works in it.
    """
    from mixmask.engine import distributed  # and with it torch, which `mixmask status` does without

    owner = Owner(run.owner_file)
    distributed.on_rank0(owner.acquire)
    if not distributed.world().is_writer:
        yield
        return
    finished = run.is_finished  # before: its record may be given other labels
    try:
        with guarded(run.path, lambda: _require(owner, run, finished)):
            yield
    finally:
        owner.release()


def _require(owner: Owner, run: RunDirectory, finished_before: bool) -> None:
    owner.require()
    if run.is_finished and not finished_before and not run.is_recorded:
        raise OwnershipLost(f"{run.path}: has been finished by another process; nothing more was written")
