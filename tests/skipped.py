"""What was skipped, and how to run it: printed at the end of the tests."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

# What a reason says, and what to do about it.
REMEDIES = {
    r"Detectron2 cannot be imported": "give its sources: PYTHONPATH=<clone of facebookresearch/detectron2> make test",
    r"needs a GPU": "run `make test` on a machine with a GPU",
    r"MIXMASK_FOREIGN": "give a folder with clones of other projects: MIXMASK_FOREIGN=<folder> make test",
    r"wandb is not installed": ".venv/bin/pip install wandb",
    r"on this machine": "install the packages that the reason names",
    r"superuser": "run the tests as another user than root",
    r"faster-coco-eval": ".venv/bin/pip install faster-coco-eval",
    r"Hugging Face's evaluate": ".venv/bin/pip install evaluate",
    r"triton": "install a build of torch for GPUs, which runs on CPUs, too",
    r"playwright": ".venv/bin/pip install playwright",
}


def reason_of(report: Any) -> str:
    """Why a test was skipped, without the place in the file."""
    told = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return str(told).removeprefix("Skipped: ")


def summary(reasons: list[str]) -> list[str]:
    """A line for every reason, the most frequent first, and one that says how to run these tests."""
    lines = []
    for reason, count in Counter(reasons).most_common():
        lines.append(f"{count} test{'s' * (count > 1)}: {reason}")
        remedy = next((how for pattern, how in REMEDIES.items() if re.search(pattern, reason)), None)
        if remedy is not None:
            lines.append(f"    to run {'them' if count > 1 else 'it'}: {remedy}")
    return lines
