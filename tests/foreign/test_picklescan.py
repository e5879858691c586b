"""Our reader of checkpoints against picklescan's malicious samples (mmaitre314/picklescan, tests)."""

from __future__ import annotations

import inspect
import io
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.foreign.clones import clone, module_of
from tests.foreign.hostile import WEIGHTS, Plain, get_ready, read, unpickled, watched, with_weights

ROOT = clone("picklescan")
DATA = ROOT / "tests" / "data"
SAMPLES = sorted(path for path in (ROOT / "tests").glob("data*/*") if path.is_file() and path.suffix != ".7z")


@pytest.fixture(scope="module")
def scanner() -> Iterator[Any]:
    """Their scanner, which looks at a pickle's opcodes and runs none."""
    sys.path.insert(0, str(ROOT / "src"))
    try:
        import picklescan.scanner as scanner

        yield scanner
    finally:
        sys.path.remove(str(ROOT / "src"))


@pytest.fixture(scope="module", autouse=True)
def _ready(tmp_path_factory: pytest.TempPathFactory) -> None:
    get_ready(tmp_path_factory.mktemp("ready"))


def dangerous(scanner: Any, path: Path) -> set[str]:
    """The names for which their scanner warns of a file."""
    found = scanner.scan_file_path(str(path)).globals
    return {f"{one.module}.{one.name}" for one in found if one.safety is scanner.SafetyLevel.Dangerous}


def test_the_watch_sees_what_a_pickle_would_do() -> None:
    """That the tests below can fail: Python's own way to a name is reported."""
    with watched() as acts:
        pickle._Unpickler(io.BytesIO(b"")).find_class("colorsys", "rgb_to_hls")
    assert acts


def test_no_malicious_sample_is_read_or_acts(scanner: Any) -> None:
    bad = [path for path in SAMPLES if dangerous(scanner, path)]
    assert len(bad) > 80
    for path in bad:
        assert read(path) is None, path.name
        unpickled(path.read_bytes())


def test_beside_weights_a_malicious_sample_is_refused_or_noted(scanner: Any, tmp_path: Path) -> None:
    outcomes = []
    for path in SAMPLES:
        names = dangerous(scanner, path)
        changed = with_weights(path.read_bytes(), tmp_path / f"{path.stem}.pth") if names else None
        if changed is None:  # a benign sample, or not a pickle
            continue
        assert dangerous(scanner, changed), path.name
        contents = read(changed)
        outcomes.append(contents is None)
        if contents is not None:
            assert torch.equal(contents.tensors["weight"].read(), WEIGHTS["weight"])
            assert names & set(contents.classes), (path.name, names, contents.classes)
            assert contents.notes()
    assert outcomes.count(True) > 40
    assert outcomes.count(False) > 10  # of modules that we do not name: neutralised all the same


def test_their_payloads_in_every_protocol_and_container(tmp_path: Path) -> None:
    """The objects of their generator of samples, pickled here (which calls none) in every form of a checkpoint."""
    made = module_of(ROOT / "tests" / "init_data_files.py")
    forms: list[Callable[[object, Path], object]] = [
        lambda payload, path: torch.save({"state_dict": WEIGHTS, "callbacks": payload}, path),
        lambda payload, path: torch.save({"callbacks": payload}, path, _use_new_zipfile_serialization=False),
    ]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        forms.append(lambda payload, path, own=protocol: path.write_bytes(pickle.dumps(payload, own)))
    number = 0
    for name, kind in vars(made).items():
        if not (inspect.isclass(kind) and name.startswith("Malicious")):
            continue
        try:
            payload = kind("x") if inspect.signature(kind).parameters else kind()
            payload.__reduce__()
        except (ImportError, AttributeError):  # of what is not installed here
            continue
        for form, write in enumerate(forms):
            path = tmp_path / f"{name}-{form}.pth"
            try:
                write(payload, path)
            except (pickle.PicklingError, AttributeError):  # not in this protocol
                continue
            contents = read(path)
            assert contents is None or contents.classes, path.name
            number += 1
    assert number > 80


def test_benign_samples_are_read(scanner: Any) -> None:
    plain = sorted(DATA.glob("benign0_v*.pkl"))
    assert plain
    for path in plain:
        assert unpickled(path.read_bytes()) == Plain(io.BytesIO(path.read_bytes())).load()
    for name in ("pytorch_model.bin", "new_pytorch_model.bin"):
        assert not dangerous(scanner, DATA / name)
        contents, theirs = read(DATA / name), torch.load(DATA / name, weights_only=True)
        theirs = theirs if isinstance(theirs, dict) else {"": theirs}
        assert contents is not None
        assert not contents.classes
        assert contents.tensors.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert torch.equal(contents.tensors[key].read(), tensor), key
