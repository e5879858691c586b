"""The same class folders in every container that can be read."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mixmask.engine.data import open_split
from mixmask.engine.datasets import DataRecipe, Part
from mixmask.engine.images import ImageSet
from mixmask.engine.packing import index_shards, pack

SPLITS: dict[str, Part] = {"train": "train", "val": "test"}


def recipe(root: Path | list[Path], **keys: object) -> DataRecipe:
    places = [str(one) for one in root] if isinstance(root, list) else str(root)
    return DataRecipe.model_validate({"name": "x", "root": places, **keys})


def zipped(source: Path, file: Path, top: str = "", method: int = zipfile.ZIP_STORED) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w", method) as archive:
        for path in sorted(source.rglob("*")):
            archive.write(path, Path(top) / path.relative_to(source))
        archive.writestr(str(Path(top) / "__MACOSX/train/._x.jpg"), b"what macOS leaves")
    return file


def _zip_per_split(source: Path, out: Path) -> Path:
    for split in SPLITS:
        zipped(source / split, out / f"{split}.zip")
    return out


def packed(source: Path, out: Path, **keys: object) -> Path:
    for split, part in SPLITS.items():
        pack(open_split(recipe(source, **keys), part), out / split, 40_000)
    return out


def webdataset(source: Path, out: Path) -> Path:
    """Images by number, each with a ``.cls`` file, in two shards a split; and our index."""
    for split, part in SPLITS.items():
        images = open_split(recipe(source), part)
        (out / split).mkdir(parents=True)
        pairs = [*zip(images.paths, images.labels.tolist(), strict=True)]
        for shard, some in enumerate((pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :])):
            with tarfile.open(out / split / f"{shard:03d}.tar", "w") as tar:
                for number, (path, label) in enumerate(some):
                    for ending, content in ((path.suffix, path.read_bytes()), (".cls", str(label).encode())):
                        member = tarfile.TarInfo(f"{number:06d}{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        index_shards(out / split)
    return out


def table(images: ImageSet) -> pa.Table:
    """As Hugging Face writes it; its class names are in another order than the alphabet's."""
    names = [*reversed(images.classes)]
    columns = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in images.paths],
        "label": [names.index(images.classes[label]) for label in images.labels.tolist()],
        "caption": ["a picture"] * len(images),
    }
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _parquet(source: Path, out: Path) -> Path:
    (out / "data").mkdir(parents=True)
    for split, name in (("train", "train"), ("test", "validation")):
        whole = table(open_split(recipe(source), "train" if split == "train" else "test"))
        half = whole.num_rows // 2
        for number, part in enumerate((whole.slice(0, half), whole.slice(half))):
            pq.write_table(part, out / "data" / f"{name}-{number:05d}-of-00002.parquet", row_group_size=17)
    return out


def _arrow(source: Path, out: Path) -> Path:
    for split, part in SPLITS.items():
        (out / split).mkdir(parents=True)
        rows = table(open_split(recipe(source), part))
        with (
            pa.OSFile(str(out / split / "data-00000-of-00001.arrow"), "wb") as file,
            pa.ipc.new_stream(file, rows.schema) as writer,
        ):
            writer.write_table(rows, max_chunksize=13)
    return out


def listed(source: Path, out: Path) -> Path:
    out.mkdir(parents=True)
    for split, part in SPLITS.items():
        images = open_split(recipe(source), part)
        lines = [f"{path}\t{images.classes[label]}" for path, label in zip(images.paths, images.labels.tolist())]
        (out / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return out


CONTAINERS: dict[str, Callable[[Path, Path], Path]] = {
    "zip": lambda source, out: zipped(source, out / "a.zip"),
    "deflated below a folder": lambda source, out: zipped(source, out / "a.zip", "top", zipfile.ZIP_DEFLATED),
    "zip per split": _zip_per_split,
    "shards": packed,
    "parquet": _parquet,
    "arrow": _arrow,
}
