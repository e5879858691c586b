"""What the loader's cores do per image, against the PIL pipeline of the MoCo and MixMask scripts and against bare decoding.

    python -m benchmarks.data_path --images /data/imagenet/val [--num 100] [--repeats 7]

One core, two views of 224 pixels of every JPEG, in one run and interleaved:

- bare: decode and two antialiased resizes to 224, nothing drawn: what no loader that decodes with torchvision can beat;
- loader: this project's loader (decode, two random crops, flips, collation); photometrics belong to the device;
- loader_photometric: the loader and the batched photometrics of both views on the same core;
- pil: torchvision's PIL transforms as in those scripts, two crops, everything on the core;
- pil_geometric: only PIL's two random crops and flips, to show what the photometrics cost there.

Without --images, it draws 40 noisy JPEGs of 500×375 pixels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms as T
from torchvision.transforms.v2 import functional as TF

from benchmarks.measure import interleaved, parser, report
from mixmask.engine.augment import AugmentRecipe, Photometric
from mixmask.engine.decoding import decode
from mixmask.engine.images import FileImages
from mixmask.engine.loader import BatchPlan, StreamSource
from mixmask.engine.randomness import generator

CPU = torch.device("cpu")


def drawn(folder: Path, num: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for number in range(num):
        noise = rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)
        path = folder / f"{number}.jpg"
        Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=92)
        paths.append(path)
    return paths


class Blur:
    """The scripts' blur: PIL's, with a drawn radius."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur."""
        return image.filter(ImageFilter.GaussianBlur(radius=self.rng.uniform(0.1, 2.0)))


def pil(paths: Sequence[Path], photometric: bool) -> Callable[[], None]:
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    blur = T.RandomApply([Blur(np.random.default_rng(0))], p=0.5)
    transform = T.Compose(
        [
            T.RandomResizedCrop(224, scale=(0.2, 1.0)),
            *([jitter, T.RandomGrayscale(p=0.2), blur] if photometric else []),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )

    def run() -> None:
        for path in paths:
            with path.open("rb") as file:
                image = Image.open(file).convert("RGB")
            transform(image), transform(image)

    return run


def loader(paths: Sequence[Path], photometric: bool) -> Callable[[], None]:
    num = len(paths)
    images = FileImages(tuple(paths), torch.zeros(num, dtype=torch.int64), ("x",), paths[0].parent)
    recipe = AugmentRecipe()
    batch_size = 20
    plan = BatchPlan(num, batch_size, True, seed=0)

    def run() -> None:
        source = StreamSource(images, 0, CPU)
        for batch in source.training(plan, [recipe, recipe], 0, num // batch_size):
            if photometric:
                for number, view in enumerate(batch.views):
                    Photometric(recipe)(view, generator(0, batch.step, number), batch.rows, batch.total)

    return run


def bare(paths: Sequence[Path]) -> Callable[[], None]:
    def run() -> None:
        for path in paths:
            image = decode(path)
            for _ in range(2):
                TF.resize(image, [224, 224], antialias=True)

    return run


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=Path, help="a folder; every .jpg and .jpeg below it")
    arguments.add_argument("--num", type=int, default=100)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if given.images is None:
            paths, what = drawn(Path(folder), 40), "40 drawn 500×375 JPEGs"
        else:
            found = sorted(p for p in given.images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
            paths = found[: given.num // 20 * 20]
            what = f"{len(paths)} JPEGs of a folder, mean {sum(p.stat().st_size for p in paths) / len(paths) / 1024:.0f} KiB"
        calls = {
            "bare": bare(paths),
            "loader": loader(paths, False),
            "loader_photometric": loader(paths, True),
            "pil_geometric": pil(paths, False),
            "pil": pil(paths, True),
        }
        measured = interleaved(calls, given.repeats, "loader")
    rates = {name: len(paths) / values["seconds"] for name, values in measured.items()}
    answers = [
        {
            "question": "images/s of one core, two views each",
            "images": what,
            "images_per_second": rates,
            "loader_over_pil": rates["loader"] / rates["pil"],
            "loader_with_photometrics_over_pil": rates["loader_photometric"] / rates["pil"],
            "loader_over_bare": rates["loader"] / rates["bare"],
        },
        {"question": "all of it", **measured},
    ]
    name = "data_path_drawn" if given.images is None else "data_path"  # drawn pictures never replace real ones' figures
    report(name, "python -m benchmarks.data_path" + " --images …" * (given.images is not None), answers, given.out)


if __name__ == "__main__":
    main()
