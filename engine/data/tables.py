"""Parquet and arrow files with a column of images, as Hugging Face's datasets come.

Arrow files are mapped into memory, and any row can be read at once. A parquet file is read a row group (some hundred images)
at a time, which is slow in a random order: `mixmask pack` makes shards of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from mixmask.engine.data.folder import USUAL_SPLITS, holds_class_folders
from mixmask.engine.datasets import DataKind, DataRecipe, Part
from mixmask.engine.errors import DataError
from mixmask.engine.images import Images

ENDINGS = (".parquet", ".arrow")
PLACES = (".", "data", "default")  # where the files lie in a folder that was downloaded
ALSO = {"val": ("val", "validation", "valid", "dev")}


class Tables(DataKind):
    """A folder with ``train-00000-of-00010.parquet`` or ``train/*.arrow``, also below ``data/``; or one such file."""

    kind: ClassVar[str] = "table"
    has_columns: ClassVar[bool] = True

    @override
    def recognises(self, root: Path, data: DataRecipe) -> bool:
        if root.is_dir() and holds_class_folders(root, data):  # a table beside them tells about the images
            return False
        return bool(_files(root, data.train)) or bool(_files(root, None))

    @override
    def open(self, root: Path, data: DataRecipe, part: Part) -> Images:
        split = data.train if part == "train" else str(data.test)
        alone = part == "train" and not any(_files(root, name) for name in USUAL_SPLITS)
        files = _files(root, split) or (_files(root, None) if alone else [])
        if not files:
            raise DataError(
                f"{root}: no {' or '.join(ENDINGS)} files of the split '{split}' (data.{part}); splits there: "
                f"{', '.join(self.splits(root)) or 'none'}. data.holdout=0.2 keeps a fifth of every class for testing"
            )
        from mixmask.engine.rows import rows_of  # imports pyarrow

        return rows_of(root, split, files, data)

    @override
    def splits(self, root: Path) -> list[str]:
        found = [name for name in USUAL_SPLITS if _files(root, name)]
        return found or (["."] if _files(root, None) else [])

    @override
    def has_test(self, root: Path, data: DataRecipe) -> str | None:
        if data.test is None or not _files(root, data.test):
            return None
        return f"{root}: has a split '{data.test}', so data.holdout is not needed: leave it out"


def _files(root: Path, split: str | None) -> list[Path]:
    """The files of a split, sorted; of None all files, which are then one split."""
    if root.is_file():
        return [root] if split is None and root.suffix in ENDINGS else []
    for name in ALSO.get(split, (split,)) if split else (None,) if split is None else ():
        for place in PLACES:
            found = [path for path in _in(root / place) if name is None or path.stem == name or _begins(path, name)]
            found += _in(root / place / name) if name is not None else []
            if found:
                return sorted(found)
    return []


def _in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in ENDINGS] if folder.is_dir() else []


def _begins(path: Path, split: str) -> bool:
    """Whether a file's name begins with that of a split: ``train-00000-of-00010.parquet``."""
    return path.stem.startswith(split) and path.stem[len(split) :][0] in "-._"
