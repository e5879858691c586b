"""Images in the rows of parquet and arrow files (`engine.data.tables`)."""

from __future__ import annotations

import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import Self, override

from mixmask.engine.datasets import DataRecipe
from mixmask.engine.errors import ConfigError, DataError
from mixmask.engine.images import EncodedImages
from mixmask.engine.late import torch
from mixmask.engine.progress import say
from mixmask.engine.storage import state_of

if TYPE_CHECKING:
    from torch import Tensor

# Usual names of the column of labels, in this order.
LABELS = ("label", "labels", "fine_label", "class", "cls", "target", "wnid")
MOST_GROUPS = 4  # row groups that a process keeps


@dataclass(frozen=True, eq=False)
class RowImages(EncodedImages):
    """Images in the rows of tables.

    Attributes:
        files: The tables.
        column: The column of images: bytes, or a struct with a field ``bytes``.
        rows: (N, 3) int64: file, row group (or record batch), and row in it of each image.
    """

    files: tuple[Path, ...]
    column: str
    rows: npt.NDArray[np.int64]

    @override
    def problem(self, index: int) -> str | None:
        """Only what is read for it anyway: looking into every image of a table would read it whole."""
        if self.files[int(self.rows[index, 0])].suffix == ".parquet":
            return None
        return super().problem(index)

    @override
    def content(self, index: int) -> Tensor:
        file, group, row = self.rows[index].tolist()
        value = _group(self.files[file], self.column, group)[row]
        if pa.types.is_struct(value.type):
            value = value["bytes"] if value.is_valid else value
        if not value.is_valid:
            raise DataError(f"{self.paths[index]}: holds no image, but a path or nothing, in column '{self.column}'")
        buffer = value.as_buffer()
        return (
            torch.frombuffer(bytearray(buffer), dtype=torch.uint8) if len(buffer) else torch.empty(0, dtype=torch.uint8)
        )

    def states(self) -> Iterable[str]:
        """Size and time of the last change of each image's file."""
        states = [state_of(file) for file in self.files]
        return [states[file] for file in self.rows[:, 0].tolist()]

    @override
    def _chosen(self, chosen: list[int], root: Path) -> Self:
        return replace(super()._chosen(chosen, root), rows=self.rows[chosen])


def rows_of(root: Path, split: str, files: list[Path], data: DataRecipe) -> RowImages:
    """List the images in the rows of tables.

    Raises:
        DataError: If a file is damaged, or there is no column of images, or several.
        ConfigError: If ``data.image_column`` or ``data.label_column`` is not there.
    """
    with _lock:
        for key in [key for key in _groups if key[0] in files]:  # they may be others than before
            del _groups[key]
        for file in files:
            _tables.pop(file, None)
    schema = _Opened.of(files[0]).schema
    names = _class_names(schema, files[0])
    image = _image_column(files[0], schema, data.image_column)
    label = _label_column(files[0], schema, data.label_column, names) if data.labels else None
    values: list[Any] = []
    given: list[str] = []
    rows: list[tuple[int, int, int]] = []
    for number, file in enumerate(files):
        opened = _Opened.of(file)
        for column in [image, *([] if label is None else [label])]:
            if column not in opened.schema.names:
                raise DataError(f"{file}: has no column '{column}', which {files[0].name} has")
        if label is not None:
            values += opened.values(label)
        before = len(rows)
        rows += [(number, group, row) for group, size in enumerate(opened.groups) for row in range(size)]
        # Without a name of its own, an image is named by its file and row.
        found = opened.names(image) or [None] * (len(rows) - before)
        given += [
            Path(name.replace("\0", "")).name or "image" if name else f"{file.stem}-{place:08d}"
            for place, name in enumerate(found)
        ]
    if not rows:
        raise DataError(f"{files[0]}: no rows")
    if len(given) != len(rows) or (label is not None and len(values) != len(rows)):
        raise DataError(f"{files[0]}: damaged; its columns have different numbers of rows")
    labels, classes = _labels(files[0], label, values, names.get(label or "", ()))
    if label is None:
        labels = np.zeros(len(rows), np.int64)
    # As in folders of classes, so that the digest of the names is the same. Names may repeat within a class.
    inner = [f"{classes[one]}/{name}" if classes else name for one, name in zip(labels.tolist(), given, strict=True)]
    counted = Counter(inner)
    paths = [root / split / (name if counted[name] == 1 else f"{place:08d}/{name}") for place, name in enumerate(inner)]
    return RowImages(
        tuple(paths),
        labels,
        classes,
        root / split,
        files=tuple(files),
        column=image,
        rows=np.array(rows, np.int64),
    )


@dataclass(frozen=True)
class _Opened:
    """A table's schema and sizes; ``groups`` are the numbers of rows that are read at once."""

    file: Path
    schema: pa.Schema
    groups: tuple[int, ...]

    @classmethod
    def of(cls, file: Path) -> _Opened:
        try:
            if file.suffix == ".parquet":
                table = pq.ParquetFile(file)
                sizes = tuple(table.metadata.row_group(i).num_rows for i in range(table.metadata.num_row_groups))
                return cls(file, table.schema_arrow, sizes)
            batches = _batches(file)
            return cls(file, _mapped(file).schema, tuple(len(batch) for batch in batches))
        except Exception as error:  # pyarrow raises many types on a damaged file
            raise DataError(f"{file}: truncated or not a table ({_first_line(error)})") from None

    def values(self, column: str) -> list[Any]:
        """All values of a column."""
        try:
            if self.file.suffix == ".parquet":
                table = pq.ParquetFile(self.file).read(columns=[column], use_threads=False)
                found: list[Any] = table[column].to_pylist()
            else:
                found = _mapped(self.file)[column].to_pylist()
        except Exception as error:
            raise DataError(f"{self.file}: damaged in column '{column}' ({_first_line(error)})") from None
        return found

    def names(self, column: str) -> list[str | None]:
        """The file names that Hugging Face keeps beside the bytes; empty if there are none."""
        kind = self.schema.field(column).type
        if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
            return []
        try:
            if self.file.suffix == ".parquet":
                # Without reading the bytes.
                table = pq.ParquetFile(self.file).read(columns=[f"{column}.path"], use_threads=False)
                found = [None if one is None else one["path"] for one in table[column].to_pylist()]
            else:
                chunks = _mapped(self.file)[
                    column
                ].chunks  # each by itself: joined, they would be copied with all bytes
                found = [name for chunk in chunks for name in chunk.field("path").to_pylist()]
        except Exception as error:
            raise DataError(f"{self.file}: damaged in column '{column}' ({_first_line(error)})") from None
        return found


_tables: dict[Path, pa.Table] = {}  # mapped into memory, which takes none


def _mapped(file: Path) -> pa.Table:
    if file not in _tables:
        with pa.memory_map(str(file)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            # Hugging Face writes streams.
            table = pa.ipc.open_file(source).read_all() if is_file else pa.ipc.open_stream(source).read_all()
        # Damaged offsets would make Arrow read outside of the file.
        table.validate(full=True)
        _tables[file] = table
    return _tables[file]


def _batches(file: Path) -> list[pa.RecordBatch]:
    return list(_mapped(file).to_batches())


_groups: OrderedDict[tuple[Path, str, int], Any] = OrderedDict()
_lock = threading.Lock()


def _group(file: Path, column: str, group: int) -> Any:
    """One column of a row group or a record batch; the last few of them are kept."""
    with _lock:
        key = (file, column, group)
        if key in _groups:
            _groups.move_to_end(key)
            return _groups[key]
        try:
            if file.suffix == ".parquet":
                found = pq.ParquetFile(file).read_row_group(group, columns=[column], use_threads=False)[column]
                found = found.combine_chunks() if found.num_chunks != 1 else found.chunk(0)
            else:
                found = _batches(file)[group].column(column)
        except Exception as error:
            raise DataError(f"{file}: damaged in row group {group} ({_first_line(error)})") from None
        _groups[key] = found
        while len(_groups) > (MOST_GROUPS if file.suffix == ".parquet" else 4096):  # maps take no memory
            _groups.popitem(last=False)
        return found


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face's metadata says about each column."""
    try:
        return dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, ValueError, TypeError):
        return {}


def _class_names(schema: pa.Schema, file: Path) -> dict[str, tuple[str, ...]]:
    """Names of the classes of every column of class labels, from the schema or from ``dataset_info.json`` beside it."""
    features = _features(schema)
    beside = file.parent / "dataset_info.json"
    if not features and beside.is_file():
        try:
            features = dict(json.loads(beside.read_text(encoding="utf-8"))["features"])
        except (OSError, ValueError, KeyError, TypeError):
            features = {}
    return {
        name: tuple(map(str, one["names"]))
        for name, one in features.items()
        if isinstance(one, dict) and one.get("_type") == "ClassLabel" and isinstance(one.get("names"), list)
    }


def _image_column(file: Path, schema: pa.Schema, asked: str | None) -> str:
    def is_image(field: pa.Field) -> bool:
        kind = field.type
        if pa.types.is_struct(kind):
            return bool(kind.get_field_index("bytes") >= 0)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    found = [field.name for field in schema if is_image(field)]
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)[:300]
    if asked is not None:
        if asked not in found:
            raise ConfigError(
                f"data.image_column: '{asked}' is not a column of images of {file}; its columns are {columns}"
            )
        return asked
    if len(found) != 1:
        raise DataError(
            f"{file}: {'several columns' if found else 'no column'} of images "
            + (f"({', '.join(found)}); data.image_column names one" if found else f"(bytes); its columns are {columns}")
        )
    return str(found[0])


def _label_column(file: Path, schema: pa.Schema, asked: str | None, classes: dict[str, tuple[str, ...]]) -> str | None:
    def is_label(field: pa.Field) -> bool:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        return bool(is_text or pa.types.is_integer(kind) or pa.types.is_boolean(kind))

    if asked is not None:
        if asked not in schema.names or not is_label(schema.field(asked)):
            raise ConfigError(
                f"data.label_column: '{asked}' is not a column of numbers or texts of {file}; there are "
                f"{', '.join(field.name for field in schema if is_label(field)) or 'none'}"
            )
        return asked
    usual = [name for name in LABELS if name in schema.names]
    if usual:
        if not is_label(schema.field(usual[0])):
            raise DataError(
                f"{file}: its column '{usual[0]}' is of {schema.field(usual[0]).type}, which is no class; "
                f"data.label_column names another one, and data.labels=false reads images without classes"
            )
        return usual[0]
    named = [name for name in classes if name in schema.names]
    if len(named) == 1:
        return named[0]
    possible = named or [field.name for field in schema if is_label(field)]
    if possible:
        say(f"{file}: read without labels; data.label_column (--label-column) may be {', '.join(possible)}")
    return None


def _labels(
    file: Path, column: str | None, values: list[Any], names: tuple[str, ...]
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Labels, numbered by the sorted names of the classes."""
    if column is None:
        return np.zeros(0, np.int64), ()
    if any(value is None for value in values):
        raise DataError(f"{file}: {sum(value is None for value in values):,} rows have no value in column '{column}'")
    if len({*names}) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise DataError(f"{file}: two classes of column '{column}' are called {twice!r}")
    if names:
        wrong = next((value for value in values if not isinstance(value, int) or not 0 <= value < len(names)), None)
        if wrong is not None:
            raise DataError(f"{file}: the label {wrong!r} in column '{column}' is not one of its {len(names)} classes")
        texts = [names[value] for value in values]
    else:
        texts = [str(value) for value in values]
    order = {name: label for label, name in enumerate(sorted({*(names or texts)}))}
    return np.array([order[text] for text in texts], np.int64), tuple(order)
