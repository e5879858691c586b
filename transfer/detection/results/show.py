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
from mixmask.transfer.detection.results.outcomes import Box, Outcome, iou, outcomes
from mixmask.transfer.detection.results.predictions import NAME, load_detections

# Okabe and Ito's, with a dark red for what was missed; every outcome also has a word or a line style of its own.
COLOURS: dict[Outcome, str] = {
    "hit": "#009e73",
    "false alarm": "#e69f00",
    "missed": "#b2182b",
    "not counted": "#666666",
}
DASHES: dict[Outcome, str] = {"hit": "-", "false alarm": "--", "missed": "-", "not counted": ":"}
IN_WORDS: dict[Outcome, str] = {
    "hit": "hit (IoU ≥ 0.5)",
    "false alarm": "false alarm",
    "missed": "missed",
    "not counted": "difficult or a crowd: not counted",
}
LABEL_POINTS = 9.0

MOST = 20  # detections drawn in a picture
LEAST_PROBABILITY = 0.05  # of a keypoint that is drawn, as in Detectron2
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
{% if item.rows %}<details><summary>found</summary><table><tr><th>class<th>score<th><th>left, top, right, bottom</tr>
{% for row in item.rows %}<tr>{% for cell in row %}<td>{{ cell }}{% endfor %}</tr>{% endfor %}</table></details>{% endif %}
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
            (pictures.classes[d.label], f"{d.score:.2f}", outcome, ", ".join(f"{value:.0f}" for value in d.box))
            for d, outcome in zip(shown[index], outcomes(shown[index], picture.instances)[0], strict=True)
        ]
        image = base64.b64encode(_figure([(picture, shown[index])], pictures, "")).decode()
        items.append({"key": picture.key, "image": image, "rows": rows, "num_true": len(picture.instances)})
    about = (
        f"{len(chosen)} of {len(pictures)} test pictures; left what was found with a score of {least_score:g} or more, "
        f"right what is there. Green: found; orange, dashed: false alarms; red: missed; grey, dotted: difficult or a crowd, "
        f"which does not count."
    )
    environment = jinja2.Environment(autoescape=True)
    return environment.from_string(PAGE).render(title=f"Detections of {name}", about=about, items=items)


def _figure(rows: Sequence[tuple[Picture, list[FoundObject]]], pictures: DetectionSet, title: str) -> bytes:
    """A PNG with a pair of panels per picture, detections and ground truth: two pairs in a row, or a single pair."""
    from matplotlib.figure import Figure

    pairs = 1 if len(rows) == 1 else 2
    lines = -(-len(rows) // pairs)
    figure = Figure(figsize=(5.2 * 2 * pairs, 4.0 * lines + 0.8), dpi=80, layout="constrained")
    grid = figure.subplots(lines, 2 * pairs, squeeze=False)
    figure.suptitle(title, fontsize=12)
    for axes in grid.ravel():
        axes.set_axis_off()
    seen: set[Outcome] = set()
    for number, (picture, found) in enumerate(rows):
        image = np.asarray(read_rgb(picture.path))
        left, right = grid[number // pairs][2 * (number % pairs) :][:2]
        for axes, heading in ((left, f"{picture.key}: found"), (right, "true")):
            axes.imshow(image)
            axes.set_autoscale_on(False)  # what reaches over the border must not make the picture smaller
            axes.set_title(heading, fontsize=11)
        of_found, of_true = outcomes(found, picture.instances)
        seen |= {*of_found, *of_true}
        taken: list[Box] = []
        # The best come last and so lie on top, but choose the places of their labels first.
        places = [_label_place(left, d.box, _label(d, pictures), taken) for d in found]
        for detection, outcome, place in reversed([*zip(found, of_found, places, strict=True)]):
            colour = COLOURS[outcome]
            mask = None if detection.mask is None else coco_mask.decode(detection.mask).astype(bool)
            _draw(left, detection.box, _label(detection, pictures), place, outcome, mask)
            _draw_keypoints(left, detection.keypoints, LEAST_PROBABILITY, pictures, colour)
        taken = []
        for instance, outcome in zip(picture.instances, of_true, strict=True):
            name = pictures.classes[instance.label]
            text = f"missed: {name}" if outcome == "missed" else name
            # Beside keypoints, outlines would only hide them: no masks are found then.
            mask = _outline_mask(instance, picture) if pictures.keypoints is None else None
            _draw(right, instance.box, text, _label_place(right, instance.box, text, taken), outcome, mask)
            _draw_keypoints(right, instance.keypoints, 1, pictures, COLOURS[outcome])
    _legend(figure, [outcome for outcome in COLOURS if outcome in seen])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _label(detection: FoundObject, pictures: DetectionSet) -> str:
    return f"{pictures.classes[detection.label]} {detection.score:.2f}"


def _label_place(axes: Any, box: Box, text: str, taken: list[Box]) -> tuple[float, float]:
    """Left and top of a label, in pixels of the picture: by its box where no other label is; it is then taken."""
    height_px, width_px = axes.get_ylim()[0], axes.get_xlim()[1]
    # The panel is about 4.8 inches wide or 3.6 high, whichever the picture fills.
    pixels_per_point = max(width_px / (4.8 * 72), height_px / (3.6 * 72))
    width = (0.62 * len(text) + 0.8) * LABEL_POINTS * pixels_per_point
    height = 1.6 * LABEL_POINTS * pixels_per_point
    left, top, right, bottom = box
    corners = [
        (left, top - height), (left, top), (right - width, top - height), (right - width, bottom - height),
        (left, bottom - height), (left, bottom), (left, (top + bottom) / 2),
    ]  # fmt: skip
    inside = [
        (min(max(x, 0.0), max(width_px - width, 0.0)), min(max(y, 0.0), max(height_px - height, 0.0)))
        for x, y in corners
    ]
    free = (at for at in inside if all(iou((*at, at[0] + width, at[1] + height), one) == 0 for one in taken))
    place = next(free, inside[0])
    taken.append((*place, place[0] + width, place[1] + height))
    return place


def _legend(figure: Any, seen: Sequence[Outcome]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=COLOURS[one], ls=DASHES[one], lw=2.4, label=IN_WORDS[one]) for one in seen]
    if lines:
        figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), fontsize=11, frameon=False)


def _outline_mask(instance: Instance, picture: Picture) -> npt.NDArray[np.bool_] | None:
    if not instance.polygons:
        return None
    outlines = [list(polygon) for polygon in instance.polygons]
    coded = coco_mask.merge(coco_mask.frPyObjects(outlines, picture.height, picture.width))
    mask: npt.NDArray[np.bool_] = coco_mask.decode(coded).astype(bool)
    return mask


def _draw(
    axes: Any,
    box: Box,
    label: str,
    place: tuple[float, float],
    outcome: Outcome,
    mask: npt.NDArray[np.bool_] | None,
) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    left, top, right, bottom = box
    colour = COLOURS[outcome]
    if mask is not None:
        layer = np.zeros((*mask.shape, 4))
        layer[mask] = (*to_rgb(colour), 0.4)
        axes.imshow(layer)
    width, height = right - left, bottom - top
    # A white line below makes the box visible on any picture.
    axes.add_patch(Rectangle((left, top), width, height, fill=False, ec="white", lw=3.4, alpha=0.7))
    axes.add_patch(Rectangle((left, top), width, height, fill=False, ec=colour, lw=2.0, ls=DASHES[outcome]))
    ink = "black" if outcome == "false alarm" else "white"
    ground = {"facecolor": colour, "edgecolor": "none", "pad": 1.2}
    axes.text(*place, label, fontsize=LABEL_POINTS, color=ink, va="top", bbox=ground, clip_on=True, zorder=4)


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
