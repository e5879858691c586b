"""Atomic file writes, and the run directory built on them.

A new file is written beside the old one, flushed to disk, and then renamed over it in one step (`os.replace`). If the
process is killed at any moment, either the old file or the new one is there, never half of one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from pydantic import BaseModel

from mixmask.engine.config import differing_keys, identity, to_yaml
from mixmask.engine.errors import DataError, RunDirectoryError, UserError
from mixmask.engine.provenance import code
from mixmask.engine.texts import open_run_file

# The umask can only be read by changing it. Read it once, before there are threads that could create files meanwhile.
UMASK = os.umask(0)
os.umask(UMASK)


_guards: dict[Path, Callable[[], None]] = {}  # folders that this process owns, and the check before each write


@contextlib.contextmanager
def guarded(folder: Path, check: Callable[[], None]) -> Iterator[None]:
    """Within this context, this module calls ``check`` before each write in ``folder``; ``check`` raises to refuse
    it."""
    place = folder.resolve()
    _guards[place] = check
    try:
        yield
    finally:
        del _guards[place]


def require_right_to_write(path: Path) -> None:
    """Run the checks of all guarded folders that contain ``path``.

    Raises:
        OwnershipLost: If the right to write there is lost.
    """
    if _guards:
        resolved = path.resolve()
        for folder, check in list(_guards.items()):
            if resolved.is_relative_to(folder):
                check()


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically. If its folder is `guarded`, the check runs first, and again right before the rename.

    Args:
        path: The file; its folder is created if needed.
        write: Called with a binary file open for writing.

    Raises:
        OSError: If the disk is full or the folder cannot be written. The old file, if any, is untouched.
        OwnershipLost: If the folder is guarded and the right to write there is lost.
    """
    require_right_to_write(path)  # before a folder that was deleted is made again
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic only within one file system.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            # Before the rename: after a power failure, the new name must not point to data that never reached the disk.
            os.fsync(file.fileno())
        # Again: a large checkpoint takes long to write, and the directory may have been taken over meanwhile.
        require_right_to_write(path)
        os.chmod(temporary, 0o666 & ~UMASK)  # mkstemp creates files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def disk_problem(error: OSError | RuntimeError) -> str:
    """The system's reason why a file could not be written, also if torch's writer has wrapped it in a RuntimeError."""
    cause = error if isinstance(error, OSError) else error.__context__ or error
    return str(cause).splitlines()[0]


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically (see `write_atomic`)."""
    write_atomic(path, lambda file: file.write(text.encode()))


def require_output_file(path: Path, force: bool = True) -> None:
    """Refuse an output path that cannot become a file, before any work is done for it.

    Args:
        path: The output path.
        force: Whether an existing file may be replaced.

    Raises:
        UserError: If the path is a folder, one of its parents is a file, or it exists and may not be replaced.
    """
    if not force and (path.exists() or path.is_symlink()) and not path.is_dir():
        raise UserError(
            f"{path}: exists already; name another file, or replace it with --force (in Python: force=True)"
        )
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file to write")
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"{path}: cannot be written, because {parent} is a file and not a folder")


def require_own_file(path: Path, mark: bytes, force: bool) -> None:
    """Refuse to replace a file that was not written by this project.

    Args:
        path: The output path.
        mark: Bytes that stand in the first or last 2,000 bytes of every file of this kind that this project writes.
        force: Replace the file even without the mark.

    Raises:
        UserError: If a file without the mark exists there, or as `require_output_file`.
    """
    require_output_file(path)
    if force or not (path.exists() or path.is_symlink()):
        return
    own = False
    if path.is_file() and not path.is_symlink():
        with path.open("rb") as file:
            own = mark in file.read(2000)
            file.seek(max(path.stat().st_size - 2000, 0))
            own = own or mark in file.read()
    require_output_file(path, force=own)


def require_output_folder(path: Path) -> None:
    """Refuse an output path that cannot become a folder, before any work is done for it.

    Raises:
        UserError: If the path is a file, or a parent of it is one.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file and not a folder; name a folder")
    require_output_file(path / "file")


def last_lines(path: Path, size: int = 20_000) -> list[str]:
    """The lines in the last ``size`` bytes of a text file, or an empty list if it cannot be read.

    The first line may be cut off. Pipes, devices, and links that lead out of the file's folder are not read.
    """
    try:
        with open_run_file(path) as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - size, 0))
            return file.read(size).decode(errors="replace").splitlines()
    except (DataError, OSError):
        return []


def is_leftover(path: Path) -> bool:
    """Whether a file is a temporary one, as `write_atomic` leaves behind if its process is killed during a write."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _header(fingerprint: str) -> str:
    return f"# fingerprint: {fingerprint}"


class RunDirectory:
    """One run's folder: ``recipe.yaml``, ``log.jsonl``, ``checkpoint.pt``, products, and ``record.json`` at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / "recipe.yaml"
        self.log_file = path / "log.jsonl"
        self.checkpoint_file = path / "checkpoint.pt"
        self.record_file = path / "record.json"
        self.owner_file = path / "owner.json"  # who works here now
        self.attempts_file = path / "attempts.jsonl"  # which jobs have worked here, and how they ended
        self.patch_file = path / "changes.patch"  # uncommitted changes of the code, if any
        self.scratch = path / "scratch"  # for an engine that keeps files of its own (Detectron2)
        self.is_recorded = False  # whether this process has written the record

    @property
    def is_finished(self) -> bool:
        """Whether the run's record has been written."""
        return self.record_file.is_file()

    def check(self, recipe: BaseModel, fingerprint: str) -> None:
        """Refuse a folder that holds something else.

        Args:
            recipe: The resolved recipe of the run to be made.
            fingerprint: Its identity, which also covers the run it builds on (a transfer's backbone).

        Raises:
            RunDirectoryError: If the path is a file, a folder with other content, or the run of a recipe that differs
                in anything that can change numbers (the keys are listed), or of another backbone.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(f"{self.path}: is a file, a run directory was expected")
        if not self.recipe_file.is_file():
            before_work = (self.owner_file, self.attempts_file)
            if self.path.is_dir() and any(not is_leftover(p) and p not in before_work for p in self.path.iterdir()):
                raise RunDirectoryError(
                    f"{self.path}: holds files but no recipe.yaml, so it is not a run directory; name an empty one"
                )
            return
        try:
            found = type(recipe).model_validate(yaml.safe_load(self.recipe_file.read_text(encoding="utf-8")))
        except ValueError as error:
            first = str(error).splitlines()[0]
            raise RunDirectoryError(
                f"{self.recipe_file}: does not describe a run of this kind ({first}); name another run directory"
            ) from None
        except yaml.YAMLError:
            raise RunDirectoryError(f"{self.recipe_file}: damaged; name another run directory") from None
        differences = differing_keys(identity(found), identity(recipe))
        if differences:
            raise RunDirectoryError(
                f"{self.path}: holds the run of a different recipe; nothing was touched. It differs in "
                + "; ".join(differences)
            )
        if self.recipe_file.read_text(encoding="utf-8").splitlines()[0] != _header(fingerprint):
            raise RunDirectoryError(
                f"{self.path}: holds the run of the same recipe on another backbone (or from an older version); nothing "
                f"was touched. Name another run directory"
            )

    def create(self, recipe: BaseModel, fingerprint: str) -> None:
        """Run `check`, create the folder, delete temporary files that a crash left, and write the resolved recipe."""
        self.check(recipe, fingerprint)
        require_right_to_write(self.recipe_file)
        self.path.mkdir(parents=True, exist_ok=True)
        for path in self.path.iterdir():
            if is_leftover(path):
                path.unlink(missing_ok=True)
        if code().patch:
            write_atomic(self.patch_file, lambda file: file.write(code().patch))
        if not self.recipe_file.exists():
            write_text(self.recipe_file, f"{_header(fingerprint)}\n{to_yaml(recipe)}")

    def finish(self, record: str) -> None:
        """Write the record; from then on the run counts as finished."""
        write_text(self.record_file, record)
        self.is_recorded = True

    def discard_checkpoints(self) -> None:
        """Delete the checkpoint and the scratch folder, which a finished run no longer needs; the record must exist."""
        assert self.is_finished
        require_right_to_write(self.checkpoint_file)
        self.checkpoint_file.unlink(missing_ok=True)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def log(self, entry: dict[str, Any]) -> None:
        """Append ``entry`` to ``log.jsonl`` as one line of JSON."""
        require_right_to_write(self.log_file)
        # A crash can leave half a line at the end; `rewind_log` drops it when the run resumes.
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def rewind_log(self, step: int) -> None:
        """Drop the log lines after ``step``, which a resumed run writes again, and a half-written last line."""
        if not self.log_file.is_file():
            return
        kept = []
        for line in self.log_file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                if json.loads(line).get("step", 0) <= step:
                    kept.append(line + "\n")
        write_text(self.log_file, "".join(kept))


def locate_run(runs: Path, stage: str, name: str, fingerprint: str, explicit: Path | None = None) -> RunDirectory:
    """``runs/<stage>/<name>-<fingerprint>``, unless the user named a folder.

    A run's name changes no numbers. If a run with the same fingerprint exists under another name, its folder is used.
    """
    if explicit is not None:
        return RunDirectory(explicit)
    usual = runs / stage / f"{name}-{fingerprint}"
    if not usual.is_dir():
        for other in sorted((runs / stage).glob(f"*-{fingerprint}")):
            if other.is_dir():
                return RunDirectory(other)
    return RunDirectory(usual)


def state_of(path: Path) -> str:
    """Size and time of the last change of a file; empty if it is not there."""
    try:
        state = path.stat()
    except OSError:
        return ""
    return f"{state.st_size} {state.st_mtime_ns}"
