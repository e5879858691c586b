"""What holds for the whole house."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

from tests.skipped import REMEDIES, summary

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("engine", "pretrain", "transfer", "evaluate", "launch")
MODULES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]


def test_no_two_classes_have_one_name() -> None:
    found = defaultdict(list)
    for file in MODULES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                found[node.name].append(str(file.relative_to(ROOT)))
    assert {name: files for name, files in found.items() if len(files) > 1} == {}


def test_no_docstring_only_points_elsewhere() -> None:
    only = re.compile(r"(See|As) `[\w.]+`\.?$")
    pointing = [
        f"{file.relative_to(ROOT)}: {node.name}"
        for file in MODULES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and only.fullmatch(ast.get_docstring(node) or "")
    ]
    assert pointing == []


def test_modules_are_short() -> None:
    assert [str(file.relative_to(ROOT)) for file in MODULES if len(file.read_text().splitlines()) > 400] == []


def test_every_reason_to_skip_has_a_remedy() -> None:
    """A reason in the tests' sources that `skipped.REMEDIES` does not know would be printed without one."""
    reasons = [
        reason
        for file in (ROOT / "tests").rglob("*.py")
        for reason in re.findall(
            r'(?:importorskip|skipif|skip)\([^)]*?(?:reason=f?|skip\(f?)"([^"]+)"', file.read_text()
        )
    ]
    assert len(reasons) > 8
    unknown = [reason for reason in reasons if not any(re.search(known, reason) for known in REMEDIES)]
    assert unknown == []
    assert summary(["needs a GPU", "needs a GPU", "odd"]) == [
        "2 tests: needs a GPU",
        "    to run them: run `make test` on a machine with a GPU",
        "1 test: odd",
    ]
