"""Shards: images in .tar files with an index, which `mixmask pack` writes. Any image can be read at once.

A cluster's file system reads a few large files well, and millions of small ones badly. The index (``index.safetensors``)
holds for every image its shard, offset, size, CRC-32, label and name, and for every shard its size and SHA-256.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from typing_extensions import override

from mixmask.engine.data.folder import USUAL_SPLITS, holds_class_folders
from mixmask.engine.datasets import DataKind, DataRecipe, Part
from mixmask.engine.errors import DataError
from mixmask.engine.members import MemberImages
from mixmask.engine.random_access import forget, read_at
from mixmask.engine.storage import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
INDEX = "index.safetensors"
FORMAT = "mixmask-shards-1"
ANEW = "pack the source again, or delete the index and write it anew with `mixmask pack` and the folder's name"


class Shard(BaseModel):
    """One .tar file; ``size`` in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, pattern=r"^[^/\x00]+$")
    size: int = Field(ge=0, lt=1 << 60)
    sha256: str


class IndexInfo(BaseModel):
    """What an index says besides the places of its images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: tuple[str, ...]
    shards: tuple[Shard, ...]


class Shards(DataKind):
    """Folders ``train`` and ``val`` with .tar files and ``index.safetensors`` each, or one such folder."""

    kind: ClassVar[str] = "shards"

    @override
    def recognises(self, root: Path, data: DataRecipe) -> bool:
        return _has_shards(root) or (_has_shards(root / data.train) and not holds_class_folders(root, data))

    @override
    def open(self, root: Path, data: DataRecipe, part: Part) -> ShardImages:
        folder = root / (data.train if part == "train" else str(data.test))
        if _has_shards(folder):
            return read_index(folder)
        if part == "test":
            raise DataError(
                f"{folder}: no shards (data.test of '{data.name}'); data.holdout=0.2 keeps a fifth of every class for "
                f"testing"
            )
        if not root.is_dir():
            raise DataError(f"{root}: a folder of shards was expected")
        return read_index(root)

    @override
    def splits(self, root: Path) -> list[str]:
        found = [name for name in USUAL_SPLITS if _has_shards(root / name)]
        return found or (["."] if _has_shards(root) else [])

    @override
    def has_test(self, root: Path, data: DataRecipe) -> str | None:
        if data.test is None or not _has_shards(root / data.test):
            return None
        return f"{root / data.test}: is there, so data.holdout is not needed: leave it out"


def _has_shards(folder: Path) -> bool:
    """Whether a folder holds an index, or .tar files and no folders (an index is then missing)."""
    if not folder.is_dir():
        return False
    if (folder / INDEX).is_file():
        return True
    return any(tars(folder)) and not any(path.is_dir() for path in folder.iterdir())


def tars(folder: Path) -> list[Path]:
    """The .tar files in a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix == ".tar" and not path.name.startswith("."))


@dataclass(frozen=True, eq=False)
class ShardImages(MemberImages):
    """Images in .tar files.

    Attributes:
        shards: The files.
        members: (N, 4) int64: index of the shard, offset of the content, size and CRC-32 of each image.
    """

    shards: tuple[Path, ...]

    @override
    def plain_bytes(self, index: int) -> tuple[Path, int, int] | None:
        shard, offset, size, _ = self.members[index].tolist()
        return self.shards[shard], offset, size

    @override
    def content(self, index: int) -> Tensor:
        shard, offset, size, crc = self.members[index].tolist()
        content = read_at(self.shards[shard], offset, size, self.paths[index])
        if zlib.crc32(content.numpy().data) != crc:
            raise DataError(
                f"{self.shards[shard]}: damaged; the CRC-32 of {self.paths[index]} is not the one in {INDEX}"
            )
        return content


def read_index(folder: Path) -> ShardImages:
    """Read the index of a folder, and check that its shards are there and whole.

    Raises:
        DataError: If the index is missing or damaged, or a shard is missing or has another size; names the shard, and the
            first image that is cut off.
    """
    file = folder / INDEX
    if not file.is_file():
        raise DataError(
            f"{folder}: {len(tars(folder))} .tar files without an index, so their images cannot be found; `mixmask pack "
            f"{folder}` writes {INDEX} beside them"
        )
    try:
        with safe_open(file, framework="np") as opened:
            metadata = opened.metadata() or {}
            if FORMAT not in metadata:
                raise DataError(f"{file}: not an index of shards (no '{FORMAT}' in its metadata)")
            info = IndexInfo.model_validate_json(metadata[FORMAT])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        # pydantic's errors are ValueErrors; of types that NumPy lacks, safetensors raises the last two.
        raise DataError(f"{file}: truncated or damaged ({str(error).splitlines()[0]}); {ANEW}") from None
    members, labels = tensors.get("members"), tensors.get("labels")
    held, spelt = tensors.get("validation"), tensors.get("names")
    if spelt is None or spelt.dtype != np.uint8 or spelt.ndim != 1:
        raise DataError(f"{file}: damaged; it has no names of images; {ANEW}")
    names = spelt.tobytes().decode("utf-8", "surrogateescape").replace("\0", "").split("\n")
    if not _fits(info, names, members, labels, held):
        raise DataError(f"{file}: damaged; names, places and labels do not fit together; {ANEW}")
    assert members is not None
    assert labels is not None
    forget(folder / shard.name for shard in info.shards)
    for number, shard in enumerate(info.shards):
        _require_whole(folder / shard.name, shard, number, members, names)
    return ShardImages(
        tuple(folder / name for name in names),
        labels,
        info.classes,
        folder,
        validation=None if held is None else held.astype(np.bool_),
        shards=tuple(folder / shard.name for shard in info.shards),
        members=members,
    )


def _fits(info: IndexInfo, names: list[str], members: Array | None, labels: Array | None, held: Array | None) -> bool:
    if members is None or labels is None or members.dtype != np.int64 or members.shape != (len(names), 4):
        return False
    if held is not None and (held.shape != (len(names),) or held.dtype != np.uint8):
        return False
    if labels.ndim not in (1, 2) or len(labels) != len(names):
        return False
    if labels.dtype != (np.int64 if labels.ndim == 1 else np.int8):
        return False
    if labels.ndim == 1 and not (int(labels.min()) >= 0 and int(labels.max()) < max(len(info.classes), 1)):
        return False
    if labels.ndim == 2 and labels.shape[1] != len(info.classes):
        return False
    shard, offset, size = members[:, 0], members[:, 1], members[:, 2]
    if int(members.min()) < 0 or int(members.max()) >= 1 << 60 or int(shard.max()) >= len(info.shards):
        return False
    sizes = np.array([one.size for one in info.shards])
    return bool((offset + size <= sizes[shard]).all())


def _require_whole(file: Path, shard: Shard, number: int, members: Array, names: list[str]) -> None:
    try:
        there = file.stat().st_size
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; {INDEX} lists it") from None
    if there < shard.size:
        cut = (members[:, 0] == number) & (members[:, 1] + members[:, 2] > there)
        first = names[int(np.flatnonzero(cut)[0])] if bool(cut.any()) else "none of its images, only its end"
        raise DataError(
            f"{file}: truncated; it has {there:,} bytes, and {INDEX} says {shard.size:,}. {int(cut.sum()):,} images are cut "
            f"off, the first is {first}"
        )
    if there > shard.size:
        raise DataError(f"{file}: has {there:,} bytes, and {INDEX} says {shard.size:,}: another file than was indexed")


def require_plain_text(folder: Path, classes: Sequence[str]) -> None:
    """Refuse class names that cannot be written into an index.

    Raises:
        DataError: If one is not valid UTF-8.
    """
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"{folder}: the class folder {name!r} is not valid UTF-8; rename it") from None


def write_index(
    folder: Path,
    shards: Sequence[Shard],
    members: Array,
    names: Sequence[str],
    labels: Array,
    classes: Sequence[str],
    validation: Array | None = None,
) -> Path:
    """Write the index of a folder of shards, whole or not at all; arguments as in `ShardImages`."""
    require_plain_text(folder, classes)
    info = IndexInfo(classes=tuple(classes), shards=tuple(shards))
    tensors = {
        "members": members,
        "labels": np.ascontiguousarray(labels),
        "names": np.frombuffer("\n".join(names).encode("utf-8", "surrogateescape"), np.uint8),
    }
    if validation is not None:
        tensors["validation"] = validation.astype(np.uint8)
    # One key: safetensors writes several in any order, and the same images should give the same bytes.
    content = save(tensors, metadata={FORMAT: info.model_dump_json()})
    write_atomic(folder / INDEX, lambda file: file.write(content))
    return folder / INDEX
