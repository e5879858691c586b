"""What commands take before they do anything: CPU seconds and peak memory, beside `import torch` in the same run.

    python -m benchmarks.start_up [--repeats 7]

The dry run is of a suite with two cells, pretraining and kNN, on the 90 pictures that it draws.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measure import parser, report

SUITE = """
name: two
grids:
  - pretrain:
      - config: imagenet_mocov2_mixmask
        set: {set}
    transfer:
      - {{config: knn_photos, set: {{data.name: drawn, data.root: {root}}}}}
"""


def draw(root: Path) -> None:
    rng = np.random.default_rng(0)
    for split, num in (("train", 20), ("val", 10)):
        for name in ("one", "two", "three"):
            (root / split / name).mkdir(parents=True)
            for number in range(num):
                pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{split}{number}.jpg")


# A process of its own: the peak memory of a child counts what its parent had when it was started.
RUNNER = """
import json, resource, subprocess, sys
subprocess.run(json.loads(sys.argv[1]), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""


def taken(command: list[str]) -> tuple[float, float]:
    """CPU seconds (user and system) and peak MiB of one process."""
    told = [sys.executable, "-c", RUNNER, json.dumps([sys.executable, *command])]
    seconds, peak = json.loads(subprocess.run(told, check=True, capture_output=True, text=True).stdout)
    return seconds, peak


def main() -> None:
    options = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, suite = Path(folder) / "data", Path(folder) / "two.yaml"
        draw(root)
        keys = {
            "data.name": "drawn",
            "data.root": str(root),
            "batch_size": 8,
            "framework.queue_size": 64,
            "framework.bn_splits": 1,
            "mix.mask_groups": 1,
        }
        suite.write_text(SUITE.format(set=json.dumps(keys), root=json.dumps(str(root))))
        mixmask = ["-m", "mixmask"]
        commands = {
            "import torch": ["-c", "import torch"],
            "launch --dry-run, two cells": [
                *mixmask, "launch", str(suite), "--profile", "cpu", "--dry-run", "--runs", f"{folder}/runs",
            ],
            "mixmask configs": [*mixmask, "configs"],
            "modules of a pretraining job": ["-c", "import mixmask.pretrain.stage, torch"],
            "modules of a transfer job": ["-c", "import mixmask.transfer.stage, torch"],
        }  # fmt: skip
        for command in commands.values():
            taken(command)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(options.repeats):
            for name, command in commands.items():
                found[name].append(taken(command))
    torch_seconds = statistics.median(seconds for seconds, _ in found["import torch"])
    answers: list[dict[str, Any]] = []
    for name, values in found.items():
        seconds = statistics.median(one for one, _ in values)
        answers.append(
            {
                "question": name,
                "cpu_seconds": round(seconds, 2),
                "cpu_seconds_range": [round(one, 2) for one in (min(values)[0], max(values)[0])],
                "over_import_torch": round(seconds / torch_seconds, 2),
                "peak_MiB": round(statistics.median(peak for _, peak in values)),
            }
        )
    report("start_up", f"python -m benchmarks.start_up --repeats {options.repeats}", answers, options.out)


if __name__ == "__main__":
    main()
