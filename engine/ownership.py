"""Only one process at a time works in a run directory: an owner file with a heartbeat, and when it may be taken over.

The owner writes its identity to the file, and increments a counter in it every few seconds (the heartbeat). Another
process that wants the directory watches the file. It takes over if the owner ran on this machine and has ended, or if
the counter stands still while it is watched. No takeover depends on comparing the clocks of different machines.

An owner that counts as dead may still be alive: it was suspended (SIGSTOP, a sleeping machine), or its node lost the
cluster but not the file system. The owner therefore checks the file before every write (`Owner.require`): if the file
is gone or belongs to another process, it writes nothing more. If its own heartbeat is very late, it beats once and
waits until a process that may be taking over has seen that. A heartbeat changes the file in place and never creates it,
so it cannot undo a takeover.
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
PATIENCE_SECONDS = 120.0  # an owner without a heartbeat for this long counts as dead

TAKEN_OVER = threading.Event()  # set when this process has lost its run directory, usually to another process


def cluster_job(environment: Mapping[str, str] = os.environ) -> str | None:
    """The SLURM job of this process, with its array index if it has one (``123_4``); None outside SLURM."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment.get('SLURM_ARRAY_TASK_ID', '0')}"
    return environment.get("SLURM_JOB_ID")


def _machine() -> str:
    """The scope in which a process id is unique: this boot of this machine, and the PID namespace (of a container)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}:{uuid.getnode()}"


def _lives(pid: int) -> bool:
    try:
        # Signal 0 is not delivered; it only checks that the process exists.
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # It exists, but belongs to another user.
        return True
    return True


def read_owner(file: Path) -> dict[str, Any] | None:
    """The content of an owner file; None if it is missing, empty or damaged."""
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
    """Seconds on a clock that also counts while this process, or the whole machine, is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def describe_owner(owner: Mapping[str, Any]) -> str:
    """The owner in words, for messages: its job, process, user and host."""
    job = f"job {owner['job']}, " if owner.get("job") else ""
    return f"{job}process {owner.get('pid')} of {owner.get('user')} on {owner.get('host')}"


def seems_alive(file: Path) -> bool:
    """Whether the owner seems alive, without waiting to see a heartbeat; for status displays only.

    For an owner on another machine, the age of the file decides: its modification time against this machine's clock.
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
    """Hard-link ``file`` to ``name``, in one step, unless that name is taken.

    On a file system without hard links (exFAT, some network drives) the file is copied. A reader may then find the copy
    empty for a moment, which counts as damaged and not as free.

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
    """A lock with a heartbeat: a file whose holder alone may work on something.

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
        self.lock = threading.Lock()  # the heartbeat thread and `require` both use the file
        self.ended = threading.Event()
        self.heart: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the file; if it has an owner, wait until it is clear whether that owner is alive.

        If the owner is an earlier start of the same cluster job and is alive, wait for it without limit. Its node was
        lost to the cluster but not to the file system, and this start has nothing else to do.

        Raises:
            RunDirectoryError: If the owner is alive, or the folder cannot be written.
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
        """Stop the heartbeat and delete the file, and its folder if `acquire` made it and it is empty."""
        self.ended.set()
        if self.heart is not None:
            self.heart.join()
        if not self.lost and self._is_mine():
            self.file.unlink(missing_ok=True)
        if self.made_folder:
            with contextlib.suppress(OSError):  # not empty: it holds work
                self.file.parent.rmdir()

    def require(self) -> None:
        """Check that this process is still the owner; called before every write.

        Raises:
            OwnershipLost: If the file is gone or belongs to another process, now or at an earlier check.
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
        # The heartbeat is so late that another process may be taking over right now. A beat in time stops that. A
        # watcher looks at least once a second, so wait for two looks before trusting the file.
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
        """Create the file with its content in one step: a hard link fails if the name is taken, also on NFS."""
        self.made_folder = self.made_folder or not self.file.parent.is_dir()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        draft = self.file.with_name(f".{self.file.name}.{self.me['token']}.tmp")
        try:
            draft.write_text(json.dumps(self.me), encoding="utf-8")
            _take_name(draft, self.file)
        except FileExistsError:
            return False
        except FileNotFoundError:  # another process has just released its lock and removed the folder
            return False
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _is_dead(self, found: Mapping[str, Any]) -> bool:
        if found.get("machine") == self.me["machine"]:
            # Our own pid in a file that we did not write: its owner has ended, and the pid was given out again.
            return found["pid"] == self.me["pid"] or not _lives(int(found["pid"]))
        return False

    def _beats(self, found: Mapping[str, Any]) -> bool:
        """Whether a heartbeat is seen within ``patience`` seconds. If the counter stands still, remove the file."""
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            time.sleep(min(1.0, self.beat))
            now = read_owner(self.file)
            if now is None or now["token"] != found["token"]:
                return False  # the owner has ended, or another process was faster: look again
            if now["beat"] != found["beat"]:
                return True
        say(f"{self.file.parent}: {describe_owner(found)} has not been heard of for {self.patience:g} s; taking over")
        self._remove(found)
        return False

    def _remove(self, dead: Mapping[str, Any] | None) -> None:
        """Remove the file of a dead owner (None: a damaged file); of several processes that try, one succeeds.

        If the file has a new owner by now, or its heartbeat has moved since it was read, it is put back.
        """
        grave = self.file.with_name(f".{self.file.name}.{uuid.uuid4().hex}.tmp")
        try:
            # Renamed, not deleted: only one process can do it, and it can then check what it has removed.
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
        """Increment the counter in the file, in place; False if the file is gone or belongs to another process."""
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
        except OSError:  # a full or unreachable disk: the beat is late, and the next write checks again
            return True
        self.last_beat = _clock()
        return True

    def _keep_beating(self) -> None:
        while not self.ended.wait(self.beat):
            with self.lock:
                if self.lost:
                    return
                if not self._beat():  # this process was suspended and counted as dead, or the folder is gone
                    self._lose()
            if self.lost:
                say(f"{self.file.parent}: another process has taken over, or the folder is gone; stopping")
                # Only if there is a handler (the training loop's). Without one, the next write raises OwnershipLost.
                if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
                    os.kill(os.getpid(), signal.SIGTERM)
                return


@contextlib.contextmanager
def owned(run: RunDirectory) -> Iterator[None]:
    """Own a run directory within this context; of several processes, rank 0 holds the owner file.

    Every write to the directory is checked: the owner file must still be this process's, and no other process may have
    finished the run.

    Raises:
        RunDirectoryError: If another living process works in it.
    """
    from mixmask.engine import distributed  # here, as it imports torch, which `mixmask status` does without

    owner = Owner(run.owner_file)
    distributed.on_rank0(owner.acquire)
    if not distributed.world().is_writer:
        yield
        return
    # A run that was finished before may still be written to: its record may get new labels.
    finished = run.is_finished
    try:
        with guarded(run.path, lambda: _require(owner, run, finished)):
            yield
    finally:
        owner.release()


def _require(owner: Owner, run: RunDirectory, finished_before: bool) -> None:
    owner.require()
    if run.is_finished and not finished_before and not run.is_recorded:
        raise OwnershipLost(f"{run.path}: has been finished by another process; nothing more was written")
