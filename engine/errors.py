"""The errors that a user meets, and what exit code each one means.

Everything a user can put right (a path, a key, a value, a damaged file) is a `UserError`: the command line prints its
message without a traceback and exits with 2. A run that fails for another reason is a `RunFailure`: exit 1. One that
stops because it was asked to is `Interrupted`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from mixmask.engine.wording import printable


class Told(Exception):
    """An error that a user reads.

    Args:
        lines: The message, one line each. What comes from outside (names of files, keys, classes) may stand in them as it
            is: control characters and line breaks within a line are shown as codes.
    """

    prefix: ClassVar[str] = "failed"
    exit_code: ClassVar[int] = 1

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)

    def __str__(self) -> str:
        """The lines, safe to show."""
        return "\n".join(printable(str(line)) for line in self.args)

    def one_line(self) -> str:
        """The message as a part of another one."""
        return "; ".join(map(str, self.args))

    def told(self) -> str:
        """The message as a command ends with it."""
        return f"{self.prefix}: {self}"


class UserError(Told):
    """Something the user can put right. The message says what was given and what would be valid."""

    prefix: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 2


def listed(problems: Sequence[str], most: int = 10) -> list[str]:
    """Problems, one line each, the first ``most`` of them."""
    rest = len(problems) - most
    return [*problems[:most], *([f"… and {rest} more"] if rest > 0 else [])]


class ConfigError(UserError):
    """A config file or a ``key=value`` override is not valid."""


class DataError(UserError):
    """A data folder, an image or an annotation file is missing or damaged."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or does not hold the network that was asked for."""


class RunDirectoryError(UserError):
    """A run directory belongs to another recipe or other data."""


class NotWritable(RunDirectoryError):
    """A folder that runs are to be kept in cannot be written."""


class RunFailure(Told):
    """A run that started well and cannot go on, for example because its loss is no longer finite."""


class OwnershipLost(RunFailure):
    """Another process works in the run directory now, or the folder is gone: nothing more may be written there."""


class Interrupted(Told):
    """A run that was asked to stop by a signal and wrote its checkpoint. Exit: 128 + signal."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal

    def __reduce__(self) -> tuple[Any, ...]:
        """It is pickled when a process tells another one."""
        return type(self), (*self.args, self.signal)
