"""A fixed set of synthetic records, as a laboratory's folder of runs would hold them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mixmask.engine.config import fingerprint_of
from mixmask.engine.records import Record, said_before_schema_3
from mixmask.evaluate import reference

ENVIRONMENT = {
    "python": "3.11.7",
    "torch": "2.15.0",
    "torchvision": "0.29.2",
    "device": "NVIDIA H200",
    "git_commit": "0" * 40,
    "world_size": 8,
    "backend": "nccl",
}
ROWS = reference._rows()
PRETRAIN, TRANSFER = reference._document()["pretrain"], reference._document()["transfer"]


def shipped(dataset: str, framework: str, method: str) -> dict[str, Any]:
    """The recipe that comes with the project for a row of the paper; for others, a similar one."""
    plain = "vanilla" if method == "random" else method
    places = [
        *(place for place in ROWS if place[:3] == (dataset, framework, plain)),
        *(place for place in ROWS if place[1:3] == (framework, plain)),
        *(place for place in ROWS if place[2] == plain),
        *ROWS,
    ]
    return copy.deepcopy(PRETRAIN[ROWS[places[0]]["pretrain"]])


def measured(protocol: str, dataset: str) -> dict[str, Any]:
    """Likewise, of a transfer protocol."""
    names = [f"{protocol} on {dataset}", *(name for name in TRANSFER if name.startswith(protocol))]
    return copy.deepcopy(next(TRANSFER[name] for name in names if name in TRANSFER))


IMAGES = {"train": "aaaa", "test": "bbbb"}


def backbone(
    dataset: str = "cifar100",
    framework: str = "moco",
    method: str = "mixmask",
    epochs: float = 1000,
    seed: int = 0,
    mix: dict[str, Any] | None = None,
    **changes: Any,
) -> Record:
    """A pretraining run's record."""
    recipe = shipped(dataset, framework, method)
    recipe["data"]["name"], recipe["framework"]["kind"] = dataset, framework
    recipe = {
        **recipe,
        "mix": {**recipe["mix"], **(mix or {})},
        "epochs": 0 if method == "random" else epochs,
        "precision": "bf16",
        "seed": seed,
        **changes,
    }
    return Record(
        stage="pretrain",
        protocol="pretrain",
        name=f"{dataset}-{framework}-{method}".replace("_", "-"),
        dataset=dataset,
        framework=framework,
        method=method,
        arch=recipe["backbone"]["arch"],
        seed=seed,
        fingerprint=fingerprint_of(recipe),
        pretrain_dataset=dataset,
        pretrain_epochs=0 if method == "random" else epochs,
        pretrain_seed=seed,
        lineage=fingerprint_of({**recipe, "seed": None}),
        **said_before_schema_3("pretrain"),
        settings={"steps": 1000, "batch_size": recipe["batch_size"], "precision": "bf16"},
        recipe=recipe,
        metrics={"loss": 6.5, "feature_std": 0.9, "rank_me": 80.0, "images_per_second": 5120.0},
        data={"train": "aaaa"},
        environment=ENVIRONMENT,
        seconds=3600.0,
    )


SETTINGS = {
    "knn": ("k", "temperature"),
    "linear": ("lr", "epochs", "batch_size"),
    "semisup": ("labels", "epochs"),
    "detect": ("engine", "iterations", "batch_size", "lr"),
}


def transfer(
    of: Record, protocol: str, metrics: dict[str, float], dataset: str | None = None, seed: int = 0, **changes: Any
) -> Record:
    """A transfer run's record on a backbone."""
    place = {"detect_voc": "voc2007", "detect_coco": "coco2017"}.get(protocol, of.dataset)
    recipe = {**measured(protocol, dataset or place), "seed": seed, **changes}
    recipe["data"] = {**recipe["data"], "name": dataset or place}
    return Record(
        stage="transfer",
        protocol=protocol,
        **said_before_schema_3(protocol),
        name=f"{of.name}-{protocol}".replace("_", "-"),
        dataset=dataset or place,
        framework=of.framework,
        method=of.method,
        arch=of.arch,
        seed=seed,
        fingerprint=fingerprint_of(recipe, of.fingerprint),
        parent=of.fingerprint,
        pretrain_dataset=of.pretrain_dataset,
        pretrain_epochs=of.pretrain_epochs,
        pretrain_seed=of.seed,
        lineage=of.lineage,
        protocol_fingerprint=fingerprint_of({**recipe, "seed": None}),
        settings={"precision": "bf16", **{key: recipe[key] for key in SETTINGS[protocol.split("_")[0]]}},
        recipe=recipe,
        pretraining=of.recipe,
        metrics=metrics,
        data=IMAGES,
        environment=ENVIRONMENT,
        seconds=60.0,
    )


def write(records: Iterable[Record], folder: Path) -> Path:
    """Lay the records out as run directories."""
    for record in records:
        place = folder / record.stage / f"{record.name}-{record.fingerprint}"
        place.mkdir(parents=True, exist_ok=True)
        record.write(place / "record.json")
        recipe = (
            record.recipe
            if record.stage == "pretrain"
            else {**record.recipe, "backbone": f"{record.parent}.safetensors"}
        )
        (place / "recipe.yaml").write_text(f"# fingerprint: {record.fingerprint}\n{json.dumps(recipe)}\n")
    return folder


def laboratory() -> list[Record]:
    """Backbones of several methods, frameworks, budgets and seeds, and what was measured on them."""
    records: list[Record] = []

    def add(of: Record, *measured: tuple[str, dict[str, float]], **changes: Any) -> None:
        records.append(of)
        records.extend(transfer(of, protocol, metrics, **changes) for protocol, metrics in measured)

    for method, base in (
        ("random", 14.0),
        ("vanilla", 65.6),
        ("unmix", 68.4),
        ("mixmask", 68.3),
        ("mixmask+unmix", 69.9),
    ):
        for seed in range(5 if method in ("vanilla", "mixmask") else 1):
            value = base + (0.1, -0.2, 0.3, 0.0, -0.1)[seed]
            add(backbone(method=method, seed=seed), ("knn", {"knn/top1": value}))
    for method, base in (("vanilla", 60.0), ("mixmask", 63.5)):
        add(backbone(method=method, epochs=200), ("knn", {"knn/top1": base}))
        add(backbone(method=method, epochs=600), ("knn", {"knn/top1": base + 4.0}))
    for grid, value in ((4, 67.9), (8, 67.0)):
        add(backbone(mix={"grid": grid}), ("knn", {"knn/top1": value}))
    add(backbone(mix={"ratio": 0.25}), ("knn", {"knn/top1": 66.9}))
    add(backbone(mix={"ratio": [0.25, 0.75]}), ("knn", {"knn/top1": 67.7}))
    add(backbone(mix={"switch": False}), ("knn", {"knn/top1": 67.1}))
    add(backbone(method="mixmask+unmix", mix={"permutation": "same"}), ("knn", {"knn/top1": 69.3}))
    records.append(transfer(backbone(), "knn", {"knn/top1": 66.0}, k=20))
    for method, top in (("vanilla", 67.6), ("mixmask", 69.0)):
        of, longer = (backbone("imagenet1k", "mocov2", method, epochs=epochs) for epochs in (200, 800))
        add(longer, ("linear", {"linear/top1": top + 3}), ("semisup_1", {"semisup/top1": top - 20}))
        add(of, ("linear", {"linear/top1": top, "linear/top5": top + 20}))
        for share, gain in (("1", -25.0), ("10", -5.0), ("100", 8.0)):
            records.append(transfer(of, f"semisup_{share}", {"semisup/top1": top + gain, "semisup/top5": 90.0}))
        for seed in range(5):
            shift = (0.0, 0.2, -0.1, 0.1, -0.2)[seed] + (0.5 if method == "mixmask" else 0.0)
            ap = {
                "bbox/AP": 57.3 + shift,
                "bbox/AP50": 82.5 + shift,
                "bbox/AP75": 63.9 + 2 * shift,
                "bbox/AP/cat": 60.0,
            }
            records.append(transfer(longer, "detect_voc", ap, seed=seed, engine="detectron2"))
        coco = {
            "bbox/AP": 39.2,
            "bbox/AP50": 58.9,
            "bbox/AP75": 42.4,
            "segm/AP": 34.4,
            "segm/AP50": 55.7,
            "segm/AP75": 36.5,
        }
        if method == "mixmask":
            coco = {key: value + 0.4 for key, value in coco.items()}
            twice = {key: value + 1.5 for key, value in coco.items()}
            records.append(transfer(longer, "detect_coco", twice, iterations=180000, milestones=[120000, 160000]))
            ap = {"bbox/AP": 57.0, "bbox/AP50": 82.0, "bbox/AP75": 63.0}
            records.append(transfer(longer, "detect_voc", ap, engine="torchvision"))
        records.append(transfer(longer, "detect_coco", coco, engine="detectron2"))
    return records
