"""Files of ``torch.save``: the zip archive of torch 1.6 and later, and the legacy stream of earlier versions."""

from __future__ import annotations

import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from mixmask.transfer.checkpoints.pickles import load
from mixmask.transfer.checkpoints.stand_ins import Damaged, StorageKind
from mixmask.transfer.checkpoints.stored import Bytes, Storage, odd

# The pickled magic number with which the legacy stream begins.
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
CHUNK = 1 << 22


@dataclass(frozen=True)
class Pickled:
    """The content of a pickle, and the names of the classes in it that `Inert` objects stand for."""

    content: Any
    classes: tuple[str, ...]


def read_zip(path: Path) -> Pickled:
    """Read a zip archive of ``torch.save``; tensor values are read lazily.

    Raises:
        Damaged: If a record is missing, compressed or has a wrong checksum, or the archive is another kind of file.
        Refused: As `pickles.load`.
    """
    with path.open("rb") as file, _archive(file) as archive:
        infos = archive.infolist()
        names = [info.filename for info in infos]
        if len(set(names)) < len(names):
            raise Damaged("a zip archive with two records of one name")
        root = next(
            (name.removesuffix("data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")), ""
        )
        if f"{root}constants.pkl" in names or any(name.startswith(f"{root}code/") for name in names):
            raise Damaged(
                "a TorchScript archive, which is a program. Load it with torch.jit.load and save its state_dict() with "
                "torch.save"
            )
        if not root:
            numpys = all(name.endswith(".npy") for name in names)
            raise Damaged("an archive of numpy arrays (.npz)" if numpys else "a zip archive without torch's data.pkl")
        packed = next((info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED), None)
        if packed is not None:
            raise Damaged(f"compressed ({packed}); torch.save does not compress. Save it again with torch.save")
        _check_sums(archive)
        members = {info.filename: info for info in infos}
        places = {name: _place(file, info) for name, info in members.items()}

        def record(name: str) -> bytes:
            return _within(path, places[name])(0, members[name].file_size)

        if f"{root}byteorder" in names and record(f"{root}byteorder").strip() != b"little":
            raise Damaged("written on a machine of another byte order")
        content = record(f"{root}data.pkl")

    def storage(pid: Any) -> object:
        kind, key, numel = _described(pid)
        name = f"{root}data/{key}"
        if name not in places:
            raise Damaged(f"the record {name} is missing")
        return _storage(kind, members[name].file_size, numel, _within(path, places[name]))

    return Pickled(*load(io.BytesIO(content), storage))


def _archive(file: IO[bytes]) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise Damaged(str(error)) from None


def _check_sums(archive: zipfile.ZipFile) -> None:
    """Compare every record with its CRC-32. torch can be told to write none: then all are zero, and none is checked."""
    infos = archive.infolist()
    if not any(info.CRC for info in infos):
        return
    for info in infos:
        try:
            with archive.open(info) as record:
                while record.read(CHUNK):
                    pass
        except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
            raise Damaged(f"the record {info.filename} is damaged ({error})") from None


def _place(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """The byte offset in the file at which a record's content begins."""
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise Damaged(f"the record {info.filename} has no header")
    # The local header has a name and an extra field of its own; their lengths may differ from those in the directory.
    return info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _within(path: Path, begin: int) -> Bytes:
    def content(first: int, number: int) -> bytes:
        with path.open("rb") as file:
            file.seek(begin + first)
            return file.read(number)

    return content


def read_legacy(file: IO[bytes], path: Path | None = None) -> Pickled:
    """Read a legacy stream: pickles of magic number, version, system, content and storage keys, then all storages.

    Args:
        file: The stream; seekable, with a known end.
        path: The file from which values are read later; None reads them from ``file``, which is then kept alive.

    Raises:
        Damaged: If it is cut off or inconsistent, or was written on a big-endian machine.
        Refused: As `pickles.load`.
    """
    for _ in range(2):  # the magic number and the version
        load(file)
    system, _ = load(file)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise Damaged("written on a machine of another byte order")
    begins: dict[str, int] = {}
    wanted: dict[str, tuple[torch.dtype, int]] = {}

    def content_of(key: str) -> Bytes:
        def content(first: int, number: int) -> bytes:
            if key not in begins:
                raise Damaged(f"the numbers of the storage {key} are missing")
            if path is not None:
                return _within(path, begins[key])(first, number)
            file.seek(begins[key] + first)
            return file.read(number)

        return content

    def storage(pid: Any) -> object:
        # torch stored the source code of a network's class beside the class, which is all that is needed here.
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]
        kind, key, numel = _described(pid)
        if kind.dtype is None:
            raise Damaged("quantised tensors in a file of torch before 1.6")
        view = pid[5] if len(pid) > 5 else None
        wanted.setdefault(key, (kind.dtype, numel))
        made = _storage(kind, numel * kind.dtype.itemsize, numel, content_of(key))
        if view is None or not isinstance(made, Storage):
            return made
        if not isinstance(view, tuple) or len(view) != 3 or not all(isinstance(n, int) and n >= 0 for n in view[1:]):
            raise Damaged("a view of a storage without its place")
        skipped, size = view[1] * kind.dtype.itemsize, view[2] * kind.dtype.itemsize
        if skipped + size > made.size:
            raise Damaged("a view that is larger than its storage")
        return Storage(kind.dtype, size, lambda first, number: made.content(skipped + first, number))

    read = Pickled(*load(file, storage))
    keys, _ = load(file)
    end = file.tell()
    file.seek(0, io.SEEK_END)  # before Python 3.13, the seek of an mmap returns None
    length = file.tell()
    for key in keys if isinstance(keys, list) else ():
        file.seek(end)
        dtype, numel = wanted.get(str(key), (torch.uint8, 0))
        # A storage is its number of elements in eight bytes, then the elements.
        stored = int.from_bytes(file.read(8), "little")
        begins[str(key)] = end + 8
        end += 8 + stored * dtype.itemsize
        if stored < numel or end > length:
            raise Damaged("cut off")
    missing = [key for key in wanted if key not in begins]
    if missing:
        raise Damaged("cut off")
    return read


def _described(pid: Any) -> tuple[StorageKind, str, int]:
    """Class, key and number of elements of a storage, from torch's persistent id."""
    good = isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], StorageKind)
    if not good or not isinstance(pid[4], int) or pid[4] < 0 or not isinstance(pid[2], str | int):
        raise Damaged("a tensor's description that is none of torch")
    return pid[1], str(pid[2]), pid[4]


def _storage(kind: StorageKind, size: int, numel: int, content: Bytes) -> object:
    if kind.dtype is None:
        return odd("a quantised tensor")
    if numel * kind.dtype.itemsize > size:
        raise Damaged("a storage that is larger than its record")
    return Storage(kind.dtype, size, content)


def embedded(content: bytes) -> object:
    """Read the storage that a plain pickle of a tensor embeds: the bytes of a legacy ``torch.save`` stream.

    Raises:
        Damaged: If the content is not such a stream.
    """
    if not isinstance(content, bytes | bytearray):
        raise Damaged("a tensor without its numbers")
    return read_legacy(io.BytesIO(content)).content


def is_zip(path: Path) -> bool:
    """Whether a file begins like a zip archive; a truncated one is then reported as damaged, not as another format."""
    with path.open("rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


def is_legacy(path: Path) -> bool:
    """Whether a file begins like a legacy stream of ``torch.save``."""
    with path.open("rb") as file:
        return file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC
