"""``mixmask pack``: writes images into .tar shards with an index, or the index of shards that are there already."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import posixpath
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mixmask.engine.damage import content_problem
from mixmask.engine.data.folder import USUAL_SPLITS, is_image
from mixmask.engine.data.shards import INDEX, Shard, read_index, require_plain_text, tars, write_index
from mixmask.engine.data.zip_file import in_class_folders
from mixmask.engine.decoding import AS_THEY_ARE
from mixmask.engine.errors import DataError, RunFailure, UserError, listed
from mixmask.engine.images import ImageSet
from mixmask.engine.late import torch
from mixmask.engine.progress import say, track
from mixmask.engine.storage import require_output_folder

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 512  # bytes: .tar files consist of such blocks
CHUNK = 256


@dataclass(frozen=True)
class Packed:
    """What was written.

    Attributes:
        folder: Where.
        num_images: How many images.
        num_shards: How many .tar files.
        num_bytes: Their size.
        left_out: What is wrong with each image that was left out.
        before: Whether they were packed before.
    """

    folder: Path
    num_images: int
    num_shards: int
    num_bytes: int
    left_out: list[str]
    before: bool = False

    def describe(self) -> str:
        """A summary on one line."""
        return (
            f"{self.folder}: {self.num_images:,} images in {self.num_shards:,} shard{'s' * (self.num_shards != 1)}, "
            f"{self.num_bytes / 1e6:,.1f} MB"
            + f"; {len(self.left_out):,} unreadable images left out" * bool(self.left_out)
            + " (packed before)" * self.before
        )


def pack(images: ImageSet, out: Path, shard_bytes: int, quick: bool = False, skip_unreadable: bool = False) -> Packed:
    """Write images into .tar shards, in their order, with an index.

    The shards hold the files byte for byte; images that are in memory (CIFAR's archives) become PNG. A run on the shards
    equals a run on the source bit for bit. Everything is written into a hidden folder beside ``out``, which gets its name at
    the end: a packing that was broken off leaves nothing that could be taken for a whole one.

    Args:
        images: What to pack.
        out: The folder for the shards and the index; empty or new. If it holds the same images already, nothing is done.
        shard_bytes: A shard is closed when it has reached this size.
        quick: Check a JPEG's first and last bytes only; by default every image is decoded.
        skip_unreadable: Leave damaged images out, instead of refusing the whole set.

    Raises:
        DataError: If images are damaged; names the first ten.
        UserError: If ``out`` holds something else.
        RunFailure: If the disk is full.
    """
    check_pack(images, out)
    if (out / INDEX).exists():
        there = read_index(out)
        return Packed(out, len(there), len(there.shards), sum(path.stat().st_size for path in there.shards), [], True)
    names = _names(images)
    as_they_are = images.with_decoding(channels=0)

    def take(index: int) -> tuple[Tensor, str | None]:
        try:
            content = images.encoded(index)
            if quick:
                return content, content_problem(content, images.paths[index], AS_THEY_ARE)
            if images.array() is None:
                as_they_are.read(index)
        except DataError as error:
            return torch.empty(0, dtype=torch.uint8), error.one_line()
        return content, None

    temporary = out.absolute().with_name(f".{out.name}.packing")
    writer, problems, kept = _Writer(temporary, shard_bytes), list[str](), list[int]()
    chunks = [range(start, min(start + CHUNK, len(images))) for start in range(0, len(images), CHUNK)]
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a packing that was broken off
        temporary.mkdir(parents=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool, contextlib.closing(writer):
            taken = ([*zip(chunk, pool.map(take, chunk), strict=True)] for chunk in chunks)
            for chunk in track(f"{out.name}: packing images", taken, len(chunks), CHUNK):
                for index, (content, problem) in chunk:
                    if problem is not None:
                        problems.append(problem)
                    elif skip_unreadable or not problems:  # else only the other damaged images are looked for
                        writer.add(names[index], content)
                        kept.append(index)
            if problems and not skip_unreadable:
                raise DataError(
                    *listed(problems),
                    f"{len(problems):,} of {len(images):,} images cannot be read, so nothing was packed; --skip-unreadable "
                    f"leaves them out",
                )
            if not kept:
                raise DataError(f"{images.root}: none of its {len(images):,} images can be read, e.g. {problems[0]}")
            writer.finish()
        chosen = images.subset(kept) if problems else images
        write_index(
            temporary,
            writer.shards,
            np.array(writer.members, np.int64),
            [names[index] for index in kept],
            chosen.targets,
            chosen.classes,
            chosen.validation,
        )
        os.replace(temporary, out)
    except OSError as error:
        raise RunFailure(f"{out}: the shards cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Packed(out, len(kept), len(writer.shards), sum(shard.size for shard in writer.shards), problems)


def check_pack(images: ImageSet, out: Path) -> None:
    """Refuse, before anything is written, what `pack` could not do.

    Raises:
        UserError: If ``out`` is a file, or a folder with other content; or if a name cannot be written.
    """
    require_plain_text(images.root, images.classes)
    _names(images)
    require_output_folder(out)
    if not out.is_dir():
        return
    if (out / INDEX).exists():
        if read_index(out).summary() != images.summary():
            raise UserError(f"{out}: holds other packed images ({INDEX}); name another folder, or delete it")
        return
    others = sorted(path.name for path in out.iterdir())
    if others:
        raise UserError(f"{out}: is not empty ({', '.join(others[:3])}); name an empty folder for the shards")


def _names(images: ImageSet) -> list[str]:
    """A name for each image: its path below the root, so that the images' digest stays the same."""
    names = []
    for index in range(len(images)):
        name = images.inner_name(index)
        while name.startswith("../"):  # a list of paths may lie beside the images
            name = name.removeprefix("../")
        names.append(name)
    counted = Counter(names)
    names = [name if counted[name] == 1 else f"{index:08d}/{name}" for index, name in enumerate(names)]
    _require_names(images.root, names)
    return names


def _require_names(where: Path, names: Sequence[str]) -> None:
    strange = next((name for name in names if "\n" in name or "\0" in name), None)
    if strange is not None:
        raise DataError(f"{where}: the name {strange!r} has a line break; rename the file")


class _Writer:
    """Writes .tar files one after another."""

    def __init__(self, out: Path, shard_bytes: int) -> None:
        self.out, self.shard_bytes = out, shard_bytes
        self.shards: list[Shard] = []
        self.members: list[tuple[int, int, int, int]] = []
        self._tar: tarfile.TarFile | None = None

    def add(self, name: str, content: Tensor) -> None:
        if self._tar is None:
            file = self.out / f"{len(self.shards):06d}.tar"
            self._tar = tarfile.open(file, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 (closed by finish)
        member = tarfile.TarInfo(name)  # without times and owners: the same images give the same bytes
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content.numpy().tobytes()))
        padded = -(-len(content) // BLOCK) * BLOCK
        offset = self._tar.offset - padded
        self.members.append((len(self.shards), offset, len(content), zlib.crc32(content.numpy().data)))
        if self._tar.offset >= self.shard_bytes:
            self.finish()

    def finish(self) -> None:
        """Close the present shard, if there is one."""
        if self._tar is None:
            return
        file = Path(str(self._tar.name))
        self._tar.close()
        self._tar = None
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
        self.shards.append(_described(file))

    def close(self) -> None:
        """Close the present shard, which is not whole."""
        if self._tar is not None:
            with contextlib.suppress(OSError):
                self._tar.close()
            self._tar = None


def _described(file: Path) -> Shard:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return Shard(name=file.name, size=file.stat().st_size, sha256=digest.hexdigest())


# --- shards of others ------------------------------------------------------------------------------------------------


def shard_folders(folder: Path) -> list[Path]:
    """The folder itself if it holds .tar files, else those of its splits that do; the folder itself if none does."""
    if folder.is_dir() and not tars(folder):
        inner = [folder / name for name in USUAL_SPLITS if (folder / name).is_dir() and tars(folder / name)]
        return inner or [folder]
    return [folder]


def index_shards(folder: Path) -> Packed:
    """Write the index of .tar files that are there already, such as WebDataset's.

    The class of ``x.jpg`` is what ``x.cls`` beside it says; where there is none, the folder it lies in. Images at the top
    without either have no labels.

    Raises:
        DataError: If a .tar file is compressed or truncated, or only some images have a class.
        UserError: If there is an index already, or no .tar file.
    """
    if (folder / INDEX).exists():
        raise UserError(f"{folder}: has an index already ({INDEX}); delete it to write it anew")
    files = tars(folder) if folder.is_dir() else []
    if not files:
        raise UserError(f"{folder}: no .tar files to index; `mixmask pack SOURCE OUT` writes images into shards")
    names, members, said, shards = list[str](), list[tuple[int, int, int, int]](), list[str | None](), list[Shard]()
    for number, file in track(f"{folder.name}: indexing shards", enumerate(files), len(files), 1):
        found: dict[str, tuple[int, int, int]] = {}
        classes: dict[str, str] = {}
        for member, content in _walk(file):
            stem, ending = _split(member.name)
            if ending == "cls":
                classes[stem] = content.decode("utf-8", "replace").strip()
            elif is_image(member.name.rpartition("/")[2]):
                if member.name in found:
                    raise DataError(f"{file}: {member.name} is in it more than once")
                found[member.name] = (member.offset_data, member.size, zlib.crc32(content))
        samples = Counter(_split(name)[0] for name in found)
        several = next((stem for stem, count in samples.items() if count > 1), None)
        if several is not None and classes:  # without .cls files, x.jpg and x.png are two images
            both = [name for name in found if _split(name)[0] == several]
            raise DataError(
                f"{file}: {' and '.join(both[:3])} are images of one sample; shards with one image each can be read"
            )
        for name, place in found.items():
            names.append(posixpath.normpath(name))
            members.append((number, *place))
            said.append(classes.get(_split(name)[0]))
        shards.append(_described(file))
    _require_names(folder, names)
    if not names:
        raise DataError(f"{folder}: no images in its {len(files)} .tar files")
    labels, order = _labels(folder, names, said)
    counted = Counter(names)
    unique = [
        name if counted[name] == 1 else f"{files[place[0]].stem}/{name}"
        for name, place in zip(names, members, strict=True)
    ]
    try:
        write_index(folder, shards, np.array(members, np.int64), unique, labels, order)
    except OSError as error:
        raise RunFailure(f"{folder}: the index cannot be written ({error.strerror or error})") from None
    return Packed(folder, len(names), len(shards), sum(shard.size for shard in shards), [])


def _split(name: str) -> tuple[str, str]:
    """``a/b.c/x.y.cls`` to ``a/b.c/x`` and ``y.cls``, as WebDataset groups files."""
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return folder + slash + stem, ending


def _walk(file: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Every file in a .tar file, with its content.

    Raises:
        DataError: If it is compressed, truncated or damaged, or holds links to images.
    """
    last, end = "no file", 0
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if (member.islnk() or member.issym()) and is_image(member.name.rpartition("/")[2]):
                    raise DataError(
                        f"{file}: {member.name} is a link to {member.linkname}; pack files instead of links"
                    )
                if not member.isreg():
                    continue
                opened = tar.extractfile(member)
                assert opened is not None
                content = opened.read()
                if len(content) != member.size:
                    raise DataError(f"{file}: truncated inside of {member.name}")
                last = member.name
                yield member, content
            end = tar.offset
    except tarfile.TarError as error:
        with file.open("rb") as head:
            packed = head.read(2) == b"\x1f\x8b"
        raise DataError(
            f"{file}: compressed, so single images cannot be read; unpack it to a plain .tar"
            if packed
            else f"{file}: truncated or not a .tar file ({error}); {last} is the last whole file in it"
        ) from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from None
    # tarfile takes a damaged header for the end. At the true end there are two blocks of zeros, and nothing after them.
    with file.open("rb") as rest:
        rest.seek(end)
        first = rest.read(BLOCK)
        if len(first) < BLOCK or any(first) or any(any(piece) for piece in iter(lambda: rest.read(1 << 20), b"")):
            raise DataError(
                f"{file}: truncated or damaged after {last} (at byte {end:,}), which is the last whole file in it"
            )


def _labels(
    folder: Path, names: Sequence[str], said: Sequence[str | None]
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Labels and class names, from .cls files or else from folders."""
    if any(one is not None for one in said):
        absent = next((name for name, one in zip(names, said, strict=True) if one is None), None)
        if absent is not None:
            raise DataError(f"{folder}: {absent} has no .cls file beside it, and other images have one")
        classes = [str(one) for one in said]
    else:
        pairs, order = in_class_folders(names)
        if len(pairs) != len(names):
            say(f"{folder}: its images lie in no class folders and have no .cls files, so they have no labels")
            return np.zeros(len(names), np.int64), ()
        label_of = dict(pairs)
        return np.array([label_of[name] for name in names], np.int64), order
    found = {name: label for label, name in enumerate(sorted({*classes}))}
    return np.array([found[name] for name in classes], np.int64), tuple(found)
