"""The errors that a user meets, and what exit code each one means.

Everything a user can put right (a path, a key, a value, a damaged file) is a `UserError`: the command line prints its
message without a traceback and exits with 2. A run that fails for another reason is a `RunFailure`: exit 1. One that
stops because it was asked to is `Interrupted`.
"""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Something the user can put right. The message says what was given and what would be valid."""


def listed(problems: Sequence[str], most: int = 10) -> str:
    """Problems one to a line, the first ``most`` of them."""
    rest = len(problems) - most
    return "\n".join([*problems[:most], *([f"… and {rest} more"] if rest > 0 else [])])


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


class RunFailure(Exception):
    """A run that started well and cannot go on, for example because its loss is no longer finite."""


class OwnershipLost(RunFailure):
    """Another process works in the run directory now, or the folder is gone: nothing more may be written there."""


class Interrupted(Exception):
    """A run that was asked to stop by a signal and wrote its checkpoint; the same command goes on. Exit: 128 + signal."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
