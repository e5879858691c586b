"""What holds for the whole house."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

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
