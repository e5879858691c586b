"""Whether an image is damaged, found with as little work as possible; see `mixmask.engine.images.ImageSet.problem`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from mixmask.engine.decoding import RGB, Decoding, decode, decode_bytes
from mixmask.engine.errors import DataError, listed

if TYPE_CHECKING:
    from torch import Tensor

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"


def file_problem(path: Path, how: Decoding = RGB) -> str | None:
    """A message about what is wrong with one file, or None; see `ImageSet.problem`."""
    try:
        with path.open("rb") as file:
            start = file.read(2)
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 2))
            end = file.read(2)
    except OSError as error:
        return f"{path}: {error.strerror}"
    if start == JPEG_START and end == JPEG_END:
        return None
    try:
        decode(path, how)
    except DataError as error:
        return str(error)
    return None


def content_problem(content: Tensor, name: Path, how: Decoding = RGB) -> str | None:
    """Like `file_problem`, for the bytes of an image."""
    if content[:2].numpy().tobytes() == JPEG_START and content[-2:].numpy().tobytes() == JPEG_END:
        return None
    try:
        decode_bytes(content, name, how)
    except DataError as error:
        return str(error)
    return None


def check_files(paths: Sequence[Path]) -> None:
    """Find damaged images before long work starts.

    Raises:
        DataError: Naming the damaged files (the first ten).
    """
    with ThreadPoolExecutor(8) as pool:
        problems = [found for found in pool.map(file_problem, paths) if found is not None]
    if problems:
        raise DataError(*listed(problems))
