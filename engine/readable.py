"""``data.skip_unreadable``: which images of a set can be read, found by decoding each of them once.

What is found is kept in a file in the user's cache folder, so that a run that resumes, or the next run on the same data,
does not decode them all again. The file's name is a digest of the images' names, sizes and times, so images that have
been changed are decoded anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from mixmask.engine.distributed import agreed, from_first, gather_to_rank0, on_rank0, world
from mixmask.engine.errors import DataError, Told
from mixmask.engine.images import ImageSet
from mixmask.engine.progress import say, track
from mixmask.engine.storage import write_text

S = TypeVar("S", bound=ImageSet)

CHUNK = 256
MOST_TOLD = 100  # names in the log


def readable(images: S) -> S:
    """The images that can be decoded; the names of the others are told, and stand in the cache.

    A collective operation: all ranks must call it, and each decodes its share.

    Raises:
        DataError: If none can be decoded. With several ranks, an error of one ends all (see `agreed`).
    """
    file = _folder() / f"unreadable-{_digest(images)}.json"
    known = from_first(_remembered(file, len(images)) if world().is_writer else None)
    problems = agreed(lambda: _decoded(images)) if known is None else known
    if known is None:
        problems = sorted(problem for part in from_first(gather_to_rank0(problems)) for problem in part)
    on_rank0(lambda: _tell(images, problems, file, new=known is None))
    if not problems:
        return images
    without = {index for index, _ in problems}
    return images.subset([index for index in range(len(images)) if index not in without])


def _digest(images: ImageSet) -> str:
    digest = hashlib.sha256(repr(getattr(images, "decoding", None)).encode())
    for path, state in zip(images.paths, images.states(), strict=True):
        digest.update(os.fsencode(path) + f" {state}\n".encode())
    return digest.hexdigest()[:24]


def _tell(images: ImageSet, problems: list[tuple[int, str]], file: Path, new: bool) -> None:
    """Say which images are left out, and remember them."""
    if new:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps({"num_images": len(images), "unreadable": problems}))
        except (OSError, Told) as error:
            say(
                f"{images.root}: what cannot be read is not remembered ({error}); the next start decodes all images again"
            )
    if problems and len(problems) == len(images):
        raise DataError(f"{images.root}: none of its {len(images):,} images can be read, for example: {problems[0][1]}")
    if not problems:
        return
    say(f"{images.root}: {len(problems):,} of {len(images):,} images cannot be read and are left out:")
    for _, problem in problems[:MOST_TOLD]:
        say(f"  {problem}")
    if len(problems) > MOST_TOLD:
        say(f"  … and {len(problems) - MOST_TOLD:,} more; all are in {file}")


def _decoded(images: ImageSet) -> list[tuple[int, str]]:
    """Decode this rank's share; indices of the images that cannot be decoded, and why."""

    def look(index: int) -> str | None:
        try:
            images.read(index)
        except DataError as error:
            return error.one_line()
        return None

    problems: list[tuple[int, str]] = []
    mine = range(world().rank, len(images), world().size)
    chunks = [mine[start : start + CHUNK] for start in range(0, len(mine), CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        looks = ([*zip(chunk, pool.map(look, chunk), strict=True)] for chunk in chunks)
        for chunk in track(f"{images.root.name}: reading images", looks, len(chunks), CHUNK):
            problems += [(index, problem) for index, problem in chunk if problem is not None]
    return problems


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixmask"


def _remembered(file: Path, num: int) -> list[tuple[int, str]] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        problems = [(int(index), str(problem)) for index, problem in found["unreadable"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return problems if all(0 <= index < num for index, _ in problems) and found["num_images"] == num else None
