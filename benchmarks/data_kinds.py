"""Images per second from folders, a zip file, shards, and tables, on this machine's disk.

    python -m benchmarks.data_kinds --images /data/imagenet/val [--num 2400] [--repeats 5]

The same JPEGs in every container, read in a random order by one core, interleaved in one run:

- bytes: the encoded images only;
- loader: this project's loader (decode, two random crops of 224 pixels, flips, collation).

All files were written just before and lie in the page cache: this shows what each container costs the processor. What it
saves a network file system, which is the reason for shards, it cannot show. Without --images, it draws JPEGs of 500×375
pixels. Fewer images than ``--num`` are repeated.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.data_path import drawn
from benchmarks.measure import interleaved, parser, report
from mixmask.engine.crops import CropRecipe
from mixmask.engine.data import open_split
from mixmask.engine.datasets import DataRecipe
from mixmask.engine.images import EncodedImages, ImageSet
from mixmask.engine.loader import BatchPlan, StreamSource
from mixmask.engine.packing import pack

BATCH = 40


def opened(root: Path) -> ImageSet:
    return open_split(DataRecipe(name="x", root=str(root), test=None), "train")


def make(sources: list[Path], out: Path, num: int) -> dict[str, ImageSet]:
    """The images in every container."""
    folder = out / "folder"
    for number in range(num):
        place = folder / f"{number % 100:03d}"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(sources[number % len(sources)], place / f"{number:06d}.jpg")
    found = {"folder": opened(folder)}
    with zipfile.ZipFile(out / "all.zip", "w") as archive:
        for path in found["folder"].paths:
            archive.write(path, path.relative_to(folder))
    pack(found["folder"], out / "shards", 10**8, quick=True)
    rows = pa.table(
        {
            "image": [{"bytes": path.read_bytes(), "path": path.name} for path in found["folder"].paths],
            "label": found["folder"].labels.tolist(),
        }
    )
    pq.write_table(rows, out / "all.parquet", row_group_size=100)
    with pa.OSFile(str(out / "all.arrow"), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=1000)
    names = {"zip": "all.zip", "shards": "shards", "arrow": "all.arrow", "parquet": "all.parquet"}
    return {**found, **{name: opened(out / place) for name, place in names.items()}}


def reading(images: ImageSet, num: int) -> Callable[[], None]:
    assert isinstance(images, EncodedImages)
    order = random.Random(0).sample(range(len(images)), num)

    def run() -> None:
        for index in order:
            images.content(index)

    return run


def loading(images: ImageSet, num: int) -> Callable[[], None]:
    plan, view = BatchPlan(len(images), BATCH, True, seed=0), CropRecipe(scale=(0.2, 1.0))

    def run() -> None:
        source = StreamSource(images, 0, torch.device("cpu"))
        for _ in source.training(plan, [view, view], 0, num // BATCH):
            pass

    return run


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=Path, help="a folder; every .jpg and .jpeg below it")
    arguments.add_argument("--num", type=int, default=2400)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if given.images is None:
            (Path(folder) / "drawn").mkdir()
            sources, what = drawn(Path(folder) / "drawn", 40), "40 drawn 500×375 JPEGs, repeated"
        else:
            sources = sorted(p for p in given.images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
            size = sum(path.stat().st_size for path in sources) / len(sources) / 1024
            what = f"{len(sources)} JPEGs of a folder, mean {size:.0f} KiB, repeated"
        sets = make(sources, Path(folder), given.num)
        few, many = 200, min(given.num, 1200)
        # A parquet file is read a row group at a time: fewer images, or it would take all the time.
        raw = {name: reading(images, few if name == "parquet" else many) for name, images in sets.items()}
        full = {name: loading(images, few) for name, images in sets.items()}
        bytes_measured = interleaved(raw, given.repeats, "folder")
        loader_measured = interleaved(full, given.repeats, "folder")
    counts = {name: few if name == "parquet" else many for name in sets}
    answers = [
        {
            "question": "encoded images/s of one core, random order, page cache",
            "images": f"{given.num:,} of {what}",
            **{name: round(counts[name] / values["seconds"]) for name, values in bytes_measured.items()},
        },
        {
            "question": "images/s of one core through the loader, two views each",
            **{name: round(few / values["seconds"], 1) for name, values in loader_measured.items()},
            "over_folder": {name: round(values["over_folder"], 3) for name, values in loader_measured.items()},
        },
        {"question": "seconds of the loader", **loader_measured},
    ]
    command = f"python -m benchmarks.data_kinds --num {given.num} --repeats {given.repeats}" + (
        " --images …" if given.images is not None else ""
    )
    report("data_kinds", command, answers, given.out)


if __name__ == "__main__":
    main()
