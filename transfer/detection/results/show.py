"""Draw test pictures with a run's detections beside the ground truth."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco_mask

from mixmask.engine.errors import DataError
from mixmask.engine.storage import write_atomic
from mixmask.transfer.detection.data.annotations import open_test
from mixmask.transfer.detection.data.batches import read_rgb
from mixmask.transfer.detection.data.pictures import DetectionSet, Instance, Picture
from mixmask.transfer.detection.recipe import DetectRecipe
from mixmask.transfer.detection.results.metrics import FoundObject
from mixmask.transfer.detection.results.predictions import NAME, load_detections

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#f0e442",
)  # told apart by colour-blind eyes

MOST = 20  # detections drawn in a picture
LEAST_PROBABILITY = 0.05  # of a keypoint that is drawn, as in Detectron2
# On these colours, labels are black.
LIGHT = ("#f0e442", "#56b4e9", "#e69f00")

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; color: #222; background: #fff }
  main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(34rem, 100%), 1fr)); gap: 1.2rem }
  figure { margin: 0; border: 1px solid #ccc; border-radius: 6px; padding: .6rem }
  img { width: 100%; height: auto } figcaption { overflow-wrap: anywhere }
  table { border-collapse: collapse; font-size: 13px } td, th { padding: .1rem .6rem .1rem 0; text-align: left }
  @media (prefers-color-scheme: dark) { body { color: #ddd; background: #161616 } figure { border-color: #444 } }
</style>
<h1>{{ title }}</h1><p>{{ about }}</p>
<main>{% for item in items %}
<figure><img src="data:image/png;base64,{{ item.image }}" alt="Picture {{ item.key }}: found and true objects">
<figcaption><b>{{ item.key }}</b>: {{ item.rows | length }} found, {{ item.num_true }} there
{% if item.rows %}<details><summary>found</summary><table><tr><th>class<th>score<th>left, top, right, bottom</tr>
{% for row in item.rows %}<tr><td>{{ row[0] }}<td>{{ row[1] }}<td>{{ row[2] }}</tr>{% endfor %}</table></details>{% endif %}
</figcaption></figure>{% endfor %}
</main></html>
"""


def show_detections(recipe: DetectRecipe, name: str, run: Path, out: Path, num: int, least_score: float) -> str:
    """Draw test pictures of a finished run, detections left and ground truth right, as a PNG or HTML file.

    Args:
        recipe: The run's recipe.
        name: Its name.
        run: Its folder.
        out: Ends in ``.png`` or ``.html``.
        num: Number of pictures, spread evenly over the test set.
        least_score: The lowest score that is drawn; of each picture, at most the best twenty detections are.

    Returns:
        What was drawn, in words.

    Raises:
        DataError: If the suffix is another, or the run kept no detections, or its pictures are not there any more.
    """
    if out.suffix not in (".png", ".html"):
        raise DataError(f"{out}: name a .png or .html file")
    pictures = open_test(recipe)
    found = load_detections(run / NAME, pictures)
    shown = _choose(found, pictures, num, least_score)
    chosen = list(shown)
    if out.suffix == ".png":
        payload = _figure([(pictures.pictures[index], shown[index]) for index in chosen], pictures, name)
    else:
        payload = _page(chosen, shown, pictures, name, least_score).encode()
    write_atomic(out, lambda file: file.write(payload))
    drawn = sum(map(len, shown.values()))
    text = f"{out}: {len(chosen)} pictures, {drawn} detections with a score of {least_score:g} or more"
    if pictures.keypoints is not None:
        text += f"; keypoints with a probability of {LEAST_PROBABILITY} or more"
    best = max((d.score for d in found), default=None)
    if not drawn and best is not None:
        text += f"; the best of all pictures has {best:.2f}: --score {max(best / 2, 0.01):.2f} shows more"
    return text


def draw_sheet(out: Path, found: Sequence[FoundObject], pictures: DetectionSet) -> None:
    """A JPEG of eight test pictures with found and true objects, for the run's page in a report."""
    shown = _choose(found, pictures, num=8, least_score=0.3)
    sheet = Image.open(
        io.BytesIO(_figure([(pictures.pictures[index], own) for index, own in shown.items()], pictures, ""))
    )
    buffer = io.BytesIO()
    sheet.convert("RGB").save(buffer, "JPEG", quality=80)
    write_atomic(out, lambda file: file.write(buffer.getvalue()))


def _choose(
    found: Sequence[FoundObject], pictures: DetectionSet, num: int, least_score: float
) -> dict[int, list[FoundObject]]:
    """Pictures spread evenly over the set, each with the best of its detections."""
    chosen = np.linspace(0, len(pictures) - 1, min(num, len(pictures))).round().astype(int).tolist()
    shown: dict[int, list[FoundObject]] = {index: [] for index in chosen}
    for detection in found:
        if detection.picture in shown and detection.score >= least_score:
            shown[detection.picture].append(detection)
    return {index: sorted(own, key=lambda d: -d.score)[:MOST] for index, own in shown.items()}


def _page(
    chosen: Sequence[int], shown: dict[int, list[FoundObject]], pictures: DetectionSet, name: str, least_score: float
) -> str:
    items = []
    for index in chosen:
        picture = pictures.pictures[index]
        rows = [
            (pictures.classes[d.label], f"{d.score:.2f}", ", ".join(f"{value:.0f}" for value in d.box))
            for d in shown[index]
        ]
        image = base64.b64encode(_figure([(picture, shown[index])], pictures, "")).decode()
        items.append({"key": picture.key, "image": image, "rows": rows, "num_true": len(picture.instances)})
    about = (
        f"{len(chosen)} of {len(pictures)} test pictures; left what was found with a score of {least_score:g} or more, "
        f"right what is there (dashed: difficult or a crowd, which does not count)."
    )
    environment = jinja2.Environment(autoescape=True)
    return environment.from_string(PAGE).render(title=f"Detections of {name}", about=about, items=items)


def _figure(rows: Sequence[tuple[Picture, list[FoundObject]]], pictures: DetectionSet, title: str) -> bytes:
    """A PNG with a pair of panels per picture, detections and ground truth: two pairs in a row, or a single pair."""
    from matplotlib.figure import Figure

    pairs = 1 if len(rows) == 1 else 2
    lines = -(-len(rows) // pairs)
    figure = Figure(figsize=(5.2 * 2 * pairs, 4.0 * lines + 0.4), dpi=80, layout="constrained")
    grid = figure.subplots(lines, 2 * pairs, squeeze=False)
    figure.suptitle(title, fontsize=12)
    for axes in grid.ravel():
        axes.set_axis_off()
    for number, (picture, found) in enumerate(rows):
        image = np.asarray(read_rgb(picture.path))
        left, right = grid[number // pairs][2 * (number % pairs) :][:2]
        for axes, heading in ((left, f"{picture.key}: found"), (right, "true")):
            axes.imshow(image)
            axes.set_autoscale_on(False)  # what reaches over the border must not make the picture smaller
            axes.set_title(heading, fontsize=9)
        for detection in reversed(found):  # the best on top
            label = f"{pictures.classes[detection.label]} {detection.score:.2f}"
            mask = None if detection.mask is None else coco_mask.decode(detection.mask).astype(bool)
            _draw(left, detection.box, label, _colour(detection.label), mask)
            _draw_keypoints(left, detection.keypoints, LEAST_PROBABILITY, pictures, _colour(detection.label))
        for instance in picture.instances:
            # Beside keypoints, outlines would only hide them: no masks are found then.
            mask = _outline_mask(instance, picture) if pictures.keypoints is None else None
            dashed = instance.difficult or instance.crowd
            _draw(right, instance.box, pictures.classes[instance.label], _colour(instance.label), mask, dashed)
            _draw_keypoints(right, instance.keypoints, 1, pictures, _colour(instance.label))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _colour(label: int) -> str:
    return COLOURS[label % len(COLOURS)]


def _outline_mask(instance: Instance, picture: Picture) -> npt.NDArray[np.bool_] | None:
    if not instance.polygons:
        return None
    outlines = [list(polygon) for polygon in instance.polygons]
    coded = coco_mask.merge(coco_mask.frPyObjects(outlines, picture.height, picture.width))
    mask: npt.NDArray[np.bool_] = coco_mask.decode(coded).astype(bool)
    return mask


def _draw(
    axes: Any,
    box: tuple[float, float, float, float],
    label: str,
    colour: str,
    mask: npt.NDArray[np.bool_] | None,
    dashed: bool = False,
) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    left, top, right, bottom = box
    if mask is not None:
        layer = np.zeros((*mask.shape, 4))
        layer[mask] = (*to_rgb(colour), 0.45)
        axes.imshow(layer)
    style = "--" if dashed else "-"
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, ec=colour, lw=1.8, ls=style))
    ground = {"facecolor": colour, "edgecolor": "none", "pad": 1.2, "alpha": 0.85}
    ink = "black" if colour in LIGHT else "white"
    inside = top < 0.08 * axes.get_ylim()[0]  # above the box there is no room for its label
    place = "top" if inside else "bottom"
    axes.text(max(left, 0), max(top, 0), label, fontsize=7, color=ink, va=place, bbox=ground, clip_on=True)


def _draw_keypoints(axes: Any, points: Any, least: float, pictures: DetectionSet, colour: str) -> None:
    """Draw (K, 3) keypoints, those whose third number is ``least`` or more, and the lines of the skeleton between them."""
    if points is None or pictures.keypoints is None:
        return
    every = np.asarray(points, dtype=np.float64)
    shown = every[:, 2] >= least
    for one, other in pictures.keypoints.skeleton:
        if shown[one] and shown[other]:
            axes.plot(*every[[one, other], :2].T, color=colour, linewidth=1.2, alpha=0.8)
    axes.scatter(*every[shown, :2].T, s=9, color=colour, edgecolors="white", linewidths=0.5, zorder=3)
