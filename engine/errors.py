"""The errors that users see, and the exit code of each.

Everything a user can fix (a path, a key, a value, a damaged file) is a `UserError`: the command line prints its message
without a traceback and exits with code 2. A run that fails for another reason raises `RunFailure` (exit code 1). A run
stopped by a signal raises `Interrupted` (exit code 128 + signal).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from mixmask.engine.wording import printable


class Told(Exception):
    """Base of all errors whose message is written for the user.

    Args:
        lines: The message, one argument per line. Text from outside (names of files, keys, classes) can be included
            unchanged: control characters and line breaks within a line are escaped when the error is shown.
    """

    prefix: ClassVar[str] = "failed"
    exit_code: ClassVar[int] = 1

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)

    def __str__(self) -> str:
        """The message, with control characters escaped."""
        return "\n".join(printable(str(line)) for line in self.args)

    def one_line(self) -> str:
        """The message on one line, for use inside another message."""
        return "; ".join(map(str, self.args))

    def told(self) -> str:
        """The message with its prefix, as a command prints it before it exits."""
        return f"{self.prefix}: {self}"


class UserError(Told):
    """Something the user can fix. The message says what was given and what would be valid."""

    prefix: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 2


def listed(problems: Sequence[str], most: int = 10) -> list[str]:
    """The first ``most`` problems, and one more line that counts the rest."""
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
    """The folder for a run is not writable."""


class RunFailure(Told):
    """A run that started but cannot continue, for example because its loss is no longer finite."""


class OwnershipLost(RunFailure):
    """Another process has taken over the run directory, or it was deleted: this process must not write there again."""


class Interrupted(Told):
    """A run that a signal stopped after it had written its checkpoint. Exit code: 128 + signal."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep ``signal`` when the error is pickled to be sent to another process."""
        return type(self), (*self.args, self.signal)
