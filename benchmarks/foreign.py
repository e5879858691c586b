"""Run other projects' tests against ours, and write which pass, by version: docs/reference/foreign.md.

MIXMASK_FOREIGN=CLONES PYTHONPATH=CLONES/detectron2 python -m benchmarks.foreign
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "foreign.md"
PROJECTS = {  # our test file: project, its clone's folders, what of it runs against what of ours
    "picklescan": (
        "mmaitre314/picklescan",
        ("picklescan",),
        "its malicious samples and their generator against our reader of checkpoints",
    ),
    "fickling": (
        "trailofbits/fickling",
        ("fickling",),
        "the pickles that its tests judge, against our reader of checkpoints",
    ),
    "lightly": (
        "lightly-ai/lightly",
        ("lightly", "lightly_src"),
        "its tests of NT-Xent, memory bank, kNN, Barlow Twins and VICReg, on ours",
    ),
    "solo_learn": ("vturrisi/solo-learn", ("solo-learn", "solo"), "its losses beside ours on the same numbers"),
    "detectron2": (
        "facebookresearch/detectron2",
        ("detectron2", "d2"),
        "its tests of anchors, boxes, matcher, masks, RPN, RoI heads and schedules, on our torchvision engine",
    ),
    "faster_coco_eval": (
        "MiXaiLL76/faster_coco_eval",
        ("faster_coco_eval", "faster-coco-eval"),
        "its expected results and comparisons, on our COCO evaluation",
    ),
    "timm": (
        "huggingface/pytorch-image-models",
        ("timm", "timm_src", "pytorch-image-models"),
        "its tests of reading checkpoints, on our reader",
    ),
    "ffcv": ("libffcv/ffcv", ("ffcv",), "its random crops beside ours, drawn from the same numbers"),
}


def main() -> int:
    """Run the tests and write the page; the exit code is pytest's."""
    folder = os.environ.get("MIXMASK_FOREIGN")
    if folder is None:
        print("MIXMASK_FOREIGN is not set: a folder with clones of other projects", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "tests/foreign", f"--junitxml={report}"], cwd=ROOT, check=False
        )
        cases = [*ElementTree.parse(report).iter("testcase")]
    rows = [_row(name, Path(folder), cases) for name in PROJECTS]
    PAGE.write_text(_page(rows), encoding="utf-8")
    print(PAGE)
    return done.returncode


def _row(name: str, folder: Path, cases: list[ElementTree.Element]) -> str:
    project, places, what = PROJECTS[name]
    clone = next((folder / place for place in places if (folder / place).is_dir()), None)
    own = [case for case in cases if case.get("classname", "").endswith(f"test_{name}")]
    failed = [case for case in own if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in own if case.find("skipped") is not None]
    passed = len(own) - len(failed) - len(skipped)
    result = (
        f"{passed} pass"
        + (f", {len(failed)} fail" if failed else "")
        + (f", {len(skipped)} skipped" if skipped else "")
    )
    if not own or len(skipped) == len(own):
        result = "not run: no clone was given"
    return f"| [{project}](https://github.com/{project}) | {_version(clone)} | {what} | {result} |"


def _version(clone: Path | None) -> str:
    """The commit of a clone; of an unpacked archive, what a file ``.commit`` in it says."""
    if clone is None:
        return "–"
    noted = clone / ".commit"
    if noted.is_file():
        return noted.read_text(encoding="utf-8").strip()[:7]
    done = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()[:7] if re.fullmatch(r"[0-9a-f]{40}\s*", done.stdout) else "unknown"


def _page(rows: list[str]) -> str:
    return "\n".join(
        [
            "# Other projects' tests",
            "",
            "Other projects have public tests and samples. They run against this project's code, from clones that you give; "
            "nothing of them is copied here. Each test of ours may hold many of theirs. Where a project's cases are outside "
            "of what ours accepts (such as a negative temperature), they are left out, and the test says which.",
            "",
            "| project | commit | what runs | result |",
            "|---|---|---|---|",
            *rows,
            "",
            "To run them: clone the projects into one folder, then",
            "",
            "```sh",
            "MIXMASK_FOREIGN=clones PYTHONPATH=clones/detectron2 make test ARGS=tests/foreign",
            "MIXMASK_FOREIGN=clones PYTHONPATH=clones/detectron2 python -m benchmarks.foreign      # writes this page",
            "```",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
