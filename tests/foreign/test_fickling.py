"""Our reader of checkpoints against the pickles of fickling's tests (trailofbits/fickling, test)."""

from __future__ import annotations

import contextlib
import io
import pickletools
import sys
import unittest
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.foreign.clones import clone, module_of
from tests.foreign.hostile import WEIGHTS, Plain, get_ready, read, unpickled, with_weights

ROOT = clone("fickling")
# Those whose pickles are looked at there, never run.
FILES = ("test_bypasses", "test_crashes", "test_expansion_attack_analysis", "test_scanner_deactivation_analysis")
Verdicts = dict[bytes, bool]


@contextmanager
def _importable() -> Iterator[None]:
    sys.path.insert(0, str(ROOT))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def verdicts() -> Verdicts:
    """Every pickle that their tests have judged, and whether they call it unsafe; their own tests pass meanwhile."""
    found: Verdicts = {}
    with _importable():
        for file in FILES:
            module = module_of(ROOT / "test" / f"{file}.py")
            _record(module, found)
            outcome = unittest.TestResult()
            unittest.defaultTestLoader.loadTestsFromModule(module).run(outcome)
            assert outcome.testsRun > 2, file
            assert outcome.wasSuccessful(), (file, outcome.failures, outcome.errors)
    return found


def _record(module: Any, found: Verdicts) -> None:
    judge, safe, read_by_them = module.check_safety, module.Severity.LIKELY_SAFE, module.Pickled.load
    given: list[tuple[Any, bytes]] = []

    def load(content: Any, *arguments: Any, **named: Any) -> Any:
        pickled = read_by_them(content, *arguments, **named)
        given.append((pickled, content if isinstance(content, bytes) else content.getvalue()))
        return pickled

    def check_safety(pickled: Any, *arguments: Any, **named: Any) -> Any:
        result = judge(pickled, *arguments, **named)
        as_given = next((content for one, content in given if one is pickled), None)
        with contextlib.suppress(TypeError):  # one of their tests gives an opcode a text that cannot be written
            found[as_given or pickled.dumps()] = result.severity > safe
        return result

    module.check_safety = check_safety
    module.Pickled = type("Pickled", (module.Pickled,), {"load": staticmethod(load)})


@pytest.fixture(scope="module", autouse=True)
def _ready(tmp_path_factory: pytest.TempPathFactory) -> None:
    get_ready(tmp_path_factory.mktemp("ready"))


def test_no_unsafe_pickle_acts(verdicts: Verdicts, tmp_path: Path) -> None:
    unsafe = [content for content, bad in verdicts.items() if bad]
    assert len(unsafe) > 60
    for content in unsafe:
        unpickled(content)
        (tmp_path / "x.pkl").write_bytes(content)
        assert read(tmp_path / "x.pkl") is None, content


def test_beside_weights_an_unsafe_pickle_is_refused_or_noted(verdicts: Verdicts, tmp_path: Path) -> None:
    refused = noted = 0
    for content, bad in verdicts.items():
        path = with_weights(content, tmp_path / "x.pth") if bad else None
        if path is None:  # safe or malformed
            continue
        contents = read(path)
        refused += contents is None
        if contents is not None:
            assert torch.equal(contents.tensors["weight"].read(), WEIGHTS["weight"])
            names = {code.name for code, _, _ in pickletools.genops(content)} & {"GLOBAL", "STACK_GLOBAL", "INST"}
            assert contents.classes or not names, content
            noted += bool(contents.classes)
    assert refused > 30
    assert noted > 20


def test_every_module_on_their_list_is_refused_or_noted(verdicts: Verdicts, tmp_path: Path) -> None:
    modules = sys.modules["fickling.fickle"].UNSAFE_IMPORTS
    assert len(modules) > 50
    for module in sorted(modules):
        path = with_weights(f"c{module}\nx\n)R.".encode(), tmp_path / "x.pth")
        assert path is not None
        contents = read(path)
        assert contents is None or contents.classes == (f"{module}.x",), module


def test_safe_pickles_are_read(verdicts: Verdicts) -> None:
    same = 0
    for content in (content for content, bad in verdicts.items() if not bad):
        ours = unpickled(content)
        try:
            theirs = Plain(io.BytesIO(content)).load()
        except LookupError:  # with names
            continue
        assert repr(ours) == repr(theirs)  # some contain themselves
        same += 1
    assert same > 10
