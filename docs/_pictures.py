"""Make the pictures of README and the site: `make pictures`. Needs a finished `mixmask demo`, and a browser for the page.

python docs/_pictures.py DEMO        # the demo's folder, by default demo
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

from mixmask.engine.builtin_configs import config_file
from mixmask.engine.config import load_recipe
from mixmask.evaluate.collect import collect
from mixmask.evaluate.plots import plots_of
from mixmask.launch.demo import demo_data
from mixmask.pretrain.recipe import PretrainRecipe
from mixmask.pretrain.show_views import draw_views
from mixmask.transfer.detection.commands import show_detections

PICTURES = Path(__file__).resolve().parent / "pictures"
MOST_BYTES = 3_000_000  # of all pictures together
BROWSER = ("chromium", "google-chrome")

BOXES = (  # left, top, title, lines
    (10, 90, "images", ("folders, zip, shards,", "parquet, VOC, COCO")),
    (210, 90, "pretrain", ("11 frameworks ×", "MixMask, Un-Mix, …")),
    (410, 90, "backbone", ("convert to Detectron2,", "torchvision, timm")),
    (610, 90, "transfer", ("probes, finetuning,", "detection, masks")),
    (810, 90, "tables", ("with published", "numbers, statistics")),
    (410, 220, "any checkpoint", ("22 layouts,", "125 known by name")),
)
ARROWS = ((170, 125, 206, 125), (370, 125, 406, 125), (570, 125, 606, 125), (770, 125, 806, 125), (490, 216, 490, 166))


def road() -> str:
    """The road from images to tables, as SVG that can be read on light and dark ground."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 300" font-family="system-ui, sans-serif" role="img" '
        'aria-label="images, pretrain, backbone, transfer, tables; any checkpoint can be the backbone">',
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L10 5L0 10z" fill="#7a7f8c"/></marker></defs>',
        '<rect x="198" y="14" width="584" height="52" rx="10" fill="none" stroke="#7a7f8c" stroke-dasharray="5 5"/>'
        '<text x="490" y="36" text-anchor="middle" font-size="17" font-weight="600" fill="#3d7cc9">launch</text>'
        '<text x="490" y="56" text-anchor="middle" font-size="13" fill="#7a7f8c">all of it as dependent job arrays on '
        "SLURM, requeued and resumed</text>",
    ]
    for left, top, title, lines in BOXES:
        shape = f'x="{left}" y="{top}" width="160" height="74" rx="10"'
        parts.append(f'<rect {shape} fill="#3d7cc9" fill-opacity=".14" stroke="#3d7cc9"/>')
        parts.append(_text(left + 80, top + 25, title, 17, "#3d7cc9", "600"))
        parts += [_text(left + 80, top + 44 + 17 * number, line, 13, "#7a7f8c") for number, line in enumerate(lines)]
    parts += [
        f'<path d="M{x} {y}L{to_x} {to_y}" stroke="#7a7f8c" stroke-width="2" marker-end="url(#tip)"/>'
        for x, y, to_x, to_y in ARROWS
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: int, y: int, text: str, size: int, colour: str, weight: str = "400") -> str:
    style = f'font-size="{size}" font-weight="{weight}" fill="{colour}"'
    return f'<text x="{x}" y="{y}" text-anchor="middle" {style}>{text}</text>'


def views() -> Image.Image:
    """What a recipe makes of drawn pictures, as ``mixmask show-views`` draws it."""
    with tempfile.TemporaryDirectory() as folder:
        demo_data.write_classification(Path(folder) / "data", size=224, train_per_class=2, val_per_class=1, seed=3)
        overrides = [
            f"data.root={folder}/data",
            "data.name=drawn",
            "data.test=null",
            "monitor=null",
            "mix.mask_groups=1",
        ]
        recipe = load_recipe(PretrainRecipe, config_file(Path("imagenet_mocov2_mixmask"), "pretrain"), overrides)
        draw_views(recipe, Path(folder) / "views.png", 4)
        return Image.open(Path(folder) / "views.png").convert("RGB")


def page(report: Path) -> Image.Image | None:
    """The first screen of the demo's report; None without a browser."""
    found = next(filter(None, map(shutil.which, BROWSER)), None)
    if found is None:
        return None
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1280, "height": 1020})
        opened.goto(report.resolve().as_uri())
        shot = Image.open(io.BytesIO(opened.screenshot()))
        browser.close()
    return shot


def main(demo: Path) -> None:
    """Write every picture.

    Raises:
        SystemExit: If the demo has not been run, or the pictures are too large.
    """
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / "road.svg").write_text(road(), encoding="utf-8")
    _write(views(), "views.jpg", 1000)
    if not (demo / "report" / "index.html").is_file():
        raise SystemExit(f"{demo}: no finished demo; `mixmask demo` makes one, then call this again")
    os.chdir(demo.resolve().parent)  # its recipes name the data relative to where it was started
    demo = Path(demo.name)
    runs = collect(demo / "runs").distinct
    plots = {plot.id: plot for plot in plots_of(runs)}
    for id, name in (("dots-demo-shapes-knn", "demo_knn.png"), ("training-demo-shapes-mocov2", "demo_training.png")):
        (PICTURES / name).write_bytes(plots[id].render("png"))
    (run,) = (demo / "runs" / "transfer").glob("demo-mixmask-detect_voc-*")
    with tempfile.TemporaryDirectory() as folder:
        show_detections(run, Path(folder) / "found.png", 4, 0.4)
        _write(Image.open(Path(folder) / "found.png"), "found.jpg", 1400)
    shot = page(demo / "report" / "index.html")
    if shot is None:
        print("no browser: report.png was left as it is")
    else:
        shot.quantize(128).save(PICTURES / "report.png", optimize=True)
    size = sum(file.stat().st_size for file in PICTURES.iterdir())
    print(f"{PICTURES}: {size / 1e6:.2f} MB")
    if size > MOST_BYTES:
        raise SystemExit(f"more than {MOST_BYTES / 1e6:.0f} MB")


def _write(image: Image.Image, name: str, width: int) -> None:
    height = round(image.height * width / image.width)
    image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS).save(
        PICTURES / name, quality=82, optimize=True
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
