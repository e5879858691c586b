"""Reads parts of large files: many threads and worker processes at once, without a seek."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from mixmask.engine.errors import DataError, RunFailure
from mixmask.engine.late import torch

if TYPE_CHECKING:
    from torch import Tensor

MOST_OPEN = 128  # systems allow a process some 1,000 open files

_files: OrderedDict[Path, FileIO] = OrderedDict()
_lock = threading.Lock()


def read_at(path: Path, offset: int, size: int, what: Path) -> Tensor:
    """Read ``size`` bytes from ``offset`` on.

    Args:
        path: The file. It stays open, as opening is slow on network file systems.
        offset: Where, in bytes.
        size: How many bytes.
        what: What they are, for messages.

    Returns:
        (size,) uint8.

    Raises:
        DataError: If the file is missing or ends before.
        RunFailure: If the system cannot read it (a disk or a network that fails).
    """
    content = torch.empty(size, dtype=torch.uint8)
    rest, num = memoryview(content.numpy().data), 0
    try:
        file = _open(path)
        # A worker process shares its parent's open file, but a positioned read does not move the shared position. One call
        # may return fewer bytes than there are.
        while num < size and (more := os.preadv(file.fileno(), [rest[num:]], offset + num)):
            num += more
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(f"{path}: {error.strerror} (for {what})") from None
    except OSError as error:
        raise RunFailure(f"{path}: cannot be read ({error.strerror or error}; for {what})") from None
    if num != size:
        raise DataError(
            f"{path}: truncated; it ends inside of {what} ({size:,} bytes from {offset:,} on, {num:,} are there)"
        )
    return content


def forget(paths: Iterable[Path]) -> None:
    """Close files that are listed anew, as others may stand in their place."""
    with _lock:
        for path in paths:
            _files.pop(path, None)


def _open(path: Path) -> FileIO:
    with _lock:
        if path in _files:
            _files.move_to_end(path)
        else:
            _files[path] = path.open("rb", buffering=0)
            # A dropped file is closed when the last thread that reads from it lets it go.
            while len(_files) > MOST_OPEN:
                _files.popitem(last=False)
        return _files[path]
