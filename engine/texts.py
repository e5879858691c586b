"""Reads files that others wrote (lists, annotations, configs, files of run folders), with limits on kind and size."""

from __future__ import annotations

import gzip
import os
import stat
import zlib
from pathlib import Path
from typing import BinaryIO

from mixmask.engine.errors import DataError

LARGEST = 1 << 32


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Pipes, which may never end, and devices are refused.

    Raises:
        DataError: If it is missing, not a regular file, or not readable.
    """
    try:
        # O_NONBLOCK, because opening a pipe that nobody writes to would wait forever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    # fstat looks at the file that was opened; the path could point to another one by now.
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise DataError(f"{path}: is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}")
    return open(handle, "rb")


def open_run_file(path: Path) -> BinaryIO:
    """Open a regular file of a run folder; a link must not lead out of the folder.

    Raises:
        DataError: As `open_regular`, or if it is a link that leads out of the folder.
    """
    try:
        leads_out = path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve())
    except (OSError, RuntimeError) as error:  # a link to itself
        raise DataError(f"{path}: cannot be read ({error})") from None
    if leads_out:
        raise DataError(f"{path}: is a link that leads out of its folder")
    return open_regular(path)


def read_bytes(path: Path, limit: int = LARGEST) -> bytes:
    """The content of a regular file; a ``.gz`` is unpacked.

    Raises:
        DataError: As `open_regular`; also if the content exceeds ``limit`` bytes, or a ``.gz`` is not valid gzip.
    """
    with open_regular(path) as file:
        return _content(file, path, limit)


def read_run_file(path: Path, limit: int) -> bytes:
    """Like `read_bytes`, but opens the file with `open_run_file`."""
    with open_run_file(path) as file:
        return _content(file, path, limit)


def _content(file: BinaryIO, path: Path, limit: int) -> bytes:
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        raise DataError(f"{path}: has {size:,} bytes; at most {limit:,} are read")
    try:
        if path.suffix != ".gz":
            return file.read()
        with gzip.open(file) as unpacked:
            # One byte more than allowed shows that the limit is exceeded, without unpacking the rest (a gzip bomb).
            content = unpacked.read(limit + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: truncated or not a gzip file ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(content) > limit:
        raise DataError(f"{path}: unpacks to more than {limit:,} bytes")
    return content


def read_text(path: Path, limit: int = LARGEST) -> str:
    """The text of a UTF-8 file; see `read_bytes`.

    Raises:
        DataError: If it is not UTF-8, with the line and the byte, or as `read_bytes`.
    """
    content = read_bytes(path, limit)
    try:
        # utf-8-sig drops the byte order mark that some Windows editors write.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: the byte 0x{content[error.start]:02x} is not valid UTF-8; save the file as UTF-8"
        ) from None
