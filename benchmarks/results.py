"""How long 10,000 finished runs take to collect, tabulate and report.

    python -m benchmarks.results

The reference is Python's own reading of the same files (`json.loads` of each): what no collector can do without.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benchmarks.measure import interleaved, parser, report
from mixmask.engine.config import identity, load_recipe
from mixmask.evaluate.collect import collect, frame
from mixmask.evaluate.layouts import choose
from mixmask.evaluate.results import results_of
from mixmask.evaluate.table import build
from mixmask.pretrain.recipe import PretrainRecipe
from mixmask.transfer.recipe import load_transfer_recipe
from tests.evaluate.made import backbone, transfer, write

RUNS = 10_000


def make(folder: Path) -> None:
    """Half of them pretraining runs, half transfer runs, with recipes as long as real ones."""
    pretraining = identity(load_recipe(PretrainRecipe, "configs/pretrain/imagenet_mocov2_mixmask_unmix.yaml"))
    probe = identity(load_transfer_recipe("configs/transfer/cifar100_knn.yaml", ["backbone=b"]))
    records = []
    for seed in range(RUNS // 2):
        of = backbone(method=("vanilla", "mixmask", "unmix")[seed % 3], seed=seed // 3, epochs=200 * (1 + seed % 5))
        of = of.model_copy(update={"recipe": {**pretraining, **of.recipe}})
        measured = transfer(of, "knn", {"knn/top1": 50 + seed % 20})
        records += [of, measured.model_copy(update={"recipe": {**probe, **measured.recipe}})]
    write(records, folder)


def main() -> None:
    arguments = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder)
        files = sorted(folder.rglob("record.json"))
        assert len(files) == RUNS
        runs = collect(folder).distinct
        results = results_of(runs)
        answer = interleaved(
            {
                "json": lambda: [json.loads(file.read_bytes()) for file in files],
                "collect": lambda: collect(folder),
                "frame": lambda: frame(collect(folder).runs),
                "tables": lambda: [build(layout, results) for layout in choose(None, ())],
            },
            arguments.repeats,
            "json",
        )
    question = (
        f"Seconds for {RUNS:,} records: reading the JSON, collecting, collecting into a DataFrame, all tables of it"
    )
    report("results", "python -m benchmarks.results", [{"question": question, **answer}], arguments.out)


if __name__ == "__main__":
    main()
