"""The demo: the whole pipeline on synthetic pictures, with the same functions that the commands call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from mixmask.engine.builtin_configs import configs_folder
from mixmask.engine.config import load_recipe, read_config
from mixmask.engine.precision import fast_bf16, resolve_device
from mixmask.engine.progress import say
from mixmask.engine.records import Record
from mixmask.engine.storage import write_text
from mixmask.evaluate.collect import collect
from mixmask.evaluate.headline import DEMO_CAVEAT
from mixmask.evaluate.layouts import methods_by_protocols
from mixmask.evaluate.render import render
from mixmask.evaluate.report import write_report
from mixmask.evaluate.results import results_of
from mixmask.evaluate.table import build
from mixmask.launch.demo import demo_data
from mixmask.pretrain import stage as pretrain_stage
from mixmask.pretrain.recipe import BACKBONE_FILE, PretrainRecipe
from mixmask.transfer import stage as transfer_stage
from mixmask.transfer.checkpoints.export import SUFFIXES, TARGETS, export
from mixmask.transfer.checkpoints.source import read_source
from mixmask.transfer.recipe import load_transfer_recipe

METHODS = {"random": ["epochs=0"], "vanilla": ["mix.kind=none"], "mixmask": []}
CLASSIFICATION = ("knn", "linear", "semisup_1", "semisup_10", "semisup_100")
DETECTION = ("detect_voc", "detect_coco")
DETECTED = ("random", "mixmask")


def draw_data(out: Path) -> None:
    """Draw the demo's pictures into ``out/data``, unless they are there."""
    _write_data(configs_folder() / "demo" / "data.yaml", out / "data")


def run_demo(out: Path, dry_run: bool) -> None:
    """Pretrain, convert, transfer and tabulate; runs that are already finished in ``out`` are skipped.

    Args:
        out: Folder for data, runs and the table.
        dry_run: Print the commands only.
    """
    started = time.monotonic()
    folder = configs_folder() / "demo"
    precision = "bf16" if fast_bf16(resolve_device("auto")) else "fp32"
    if not dry_run:
        draw_data(out)
    trunks = {}
    for method, extra in METHODS.items():
        overrides = [
            f"name=demo-{method}",
            f"precision={precision}",
            f"data.root={out}/data/classification",
            *extra,
        ]
        trunks[method] = _pretrain(folder / "pretrain.yaml", overrides, out / "runs", dry_run)
    for target in TARGETS:
        product = out / "converted" / f"mixmask-{target}{SUFFIXES[target][0]}"
        _command(f"mixmask convert {trunks['mixmask']} {product} --to {target}")
        if not dry_run:
            say(export(read_source(trunks["mixmask"]), product, target))
    work = [(method, protocol) for protocol in CLASSIFICATION for method in METHODS]
    work += [(method, protocol) for protocol in DETECTION for method in DETECTED]
    for method, protocol in work:
        place = {"detect_voc": "voc", "detect_coco": "coco"}.get(protocol, "classification")
        overrides = [
            f"backbone={trunks[method]}",
            f"name=demo-{method}-{protocol}",
            f"precision={precision}",
            f"data.root={out}/data/{place}",
        ]
        _transfer(folder / f"{protocol}.yaml", overrides, out / "runs", dry_run)
    _command(f"mixmask tables {out}/runs; mixmask report {out}/runs --out {out}/report")
    if dry_run:
        return
    collection = collect(out / "runs")
    runs = collection.distinct
    table = build(methods_by_protocols(), results_of(runs))
    write_text(out / "table.md", render(table, "md"))
    page = write_report(collection, out / "report")
    print(f"\n{render(table, 'term')}\n{verdict([run.record for run in runs])}\n")
    minutes = (time.monotonic() - started) / 60
    say(
        f"Done in {minutes:.1f} minutes on {torch.get_num_threads()} threads. Runs are in {out}/runs, all results in {page}."
    )


def _command(line: str) -> None:
    say(f"\n$ {line}")


def _write_data(config: Path, root: Path) -> None:
    sizes, _ = read_config(config)
    # The file holds the config that the pictures were drawn with: after a change they are drawn again.
    if (root / "done").exists() and (root / "done").read_text() == config.read_text():
        return
    say(f"drawing pictures into {root}")
    started = time.monotonic()
    demo_data.write_classification(root / "classification", **sizes["classification"])
    demo_data.write_voc(root / "voc", **sizes["voc"])
    demo_data.write_coco(root / "coco", **sizes["coco"])
    write_text(root / "done", config.read_text())
    say(f"drawn in {time.monotonic() - started:.0f} s")


def _pretrain(config: Path, overrides: Sequence[str], runs: Path, dry_run: bool) -> Path:
    _command(f"mixmask pretrain {config} {' '.join(overrides)} --runs {runs}")
    if dry_run:
        return runs / "pretrain" / "…" / BACKBONE_FILE
    plan = pretrain_stage.plan(load_recipe(PretrainRecipe, config, overrides), runs)
    say(plan.describe())
    return pretrain_stage.run(plan)


def _transfer(config: Path, overrides: Sequence[str], runs: Path, dry_run: bool) -> None:
    _command(f"mixmask transfer {config} {' '.join(overrides)} --runs {runs}")
    if dry_run:
        return
    plan = transfer_stage.plan(load_transfer_recipe(config, overrides), runs)
    record = transfer_stage.run(plan)
    shown = {name: value for name, value in record.metrics.items() if name.count("/") == 1}
    say(", ".join(f"{name} {value:.1f}" for name, value in shown.items()))


def verdict(records: Sequence[Record]) -> str:
    """What the demo's numbers say, and what they do not."""
    value = {(r.method, r.protocol): r.metrics for r in records}
    lines = []
    for protocol, metric, words in (
        ("knn", "knn/top1", "at kNN"),
        ("linear", "linear/top1", "under a linear probe"),
        ("semisup_100", "semisup/top1", "after finetuning on every label"),
        ("detect_voc", "bbox/AP50", "in VOC AP50"),
        ("detect_coco", "bbox/AP50", "in COCO box AP50"),
    ):
        random = value[("random", protocol)][metric]
        differences = [
            f"{method} {value[(method, protocol)][metric] - random:+.1f}"
            for method in ("vanilla", "mixmask")
            if (method, protocol) in value
        ]
        lines.append(f"- {words}: {', '.join(differences)} points against the random trunk's {random:.1f}")
    classes = len(demo_data.CLASSES)
    return (
        f"Pretrained against randomly initialised, in this run (chance is {100 / classes:.0f} % for {classes} classes):\n"
        + "\n".join(lines)
        + "\n\n"
        f"{DEMO_CAVEAT}"
    )
