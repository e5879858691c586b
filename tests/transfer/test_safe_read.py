"""Reading files that are damaged, hostile, large or old."""

from __future__ import annotations

import gzip
import os
import pickle
import tempfile
import tracemalloc
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from mixmask.engine.backbones import load_backbone
from mixmask.engine.errors import CheckpointError
from mixmask.transfer.checkpoints.safe_read import read_tensors
from mixmask.transfer.checkpoints.source import read_source
from tests.transfer.checkpoint_files import save


def test_damaged_files_are_named(resnet18: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint file"):
        read_source(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_source(tmp_path)
    whole = save(tmp_path, load_backbone(resnet18)[0]).read_bytes()
    for name, content in (("half.pth", whole[: len(whole) // 2]), ("empty.pth", b""), ("text.pth", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            read_source(tmp_path / name)
    for name in ("backbone.safetensors", "other.safetensors"):
        (tmp_path / name).write_bytes(resnet18.read_bytes()[:5000])
        with pytest.raises(CheckpointError, match=f"{name}: truncated"):
            read_source(tmp_path / name)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return (os.system, ("touch /tmp/mixmask-was-here",))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_pickle_that_runs_code_is_refused_by_name(form: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"model": Hostile()}))
    else:
        torch.save({"state_dict": Hostile()}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"refused, it holds more than tensors.*: (posix|os)\.system"):
        read_source(path)
    assert not Path("/tmp/mixmask-was-here").exists()


def test_a_hostile_function_of_numpy_is_refused(tmp_path: Path) -> None:
    class Loads:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return (np.loadtxt, ("/etc/hostname",))

    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": Loads()}))
    with pytest.raises(CheckpointError, match=r"refused.*: numpy\S*\.loadtxt"):
        read_source(tmp_path / "x.pkl")


def test_settings_beside_the_tensors_do_no_harm(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    content = {"state_dict": state, "args": Namespace(lr=0.1), "best": np.float64(3.5), "where": tmp_path, "epoch": 3}
    for legacy in (False, True):
        torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
        assert len(read_source(tmp_path / "x.pth").tensor_report.used) == len(state)


def test_what_is_not_used_is_not_read(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    torch.save({"state_dict": state, "optimizer": {"state": [torch.zeros(20_000_000)]}}, tmp_path / "big.pth")
    torch.save(
        {"state_dict": state, "optimizer": {"state": [torch.zeros(20_000_000)]}},
        tmp_path / "legacy.pth",
        _use_new_zipfile_serialization=False,
    )
    save_file({**state, "other": torch.zeros(20_000_000)}, tmp_path / "big.safetensors")
    for name in ("big.pth", "legacy.pth", "big.safetensors"):
        tracemalloc.start()
        content = read_tensors(tmp_path / name).tensors
        assert tracemalloc.get_traced_memory()[1] < 20e6, name
        tracemalloc.stop()
        small = next(key for key in content if key.endswith("bn1.weight"))
        assert torch.equal(content[small].read(), state[small.removeprefix("state_dict.")])


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_of_every_plain_kind_are_restored(protocol: int, tmp_path: Path) -> None:
    arrays = {
        f"{kind}{order}": np.asfortranarray(np.arange(6).reshape(2, 3).astype(f"{order}{kind}"))
        for kind in ("f4", "f8", "f2", "i8", "u1")
        for order in "<>"
    }
    arrays |= {"empty": np.zeros((0, 3), dtype=np.float32), "none": np.array(7), "sure": np.array([True, False])}
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "score": np.float64(2.5)}, protocol=protocol))
    back = read_tensors(path).tensors
    assert len(back) == len(arrays)
    for name, array in arrays.items():
        assert back[f"model.{name}"].shape == array.shape
        assert np.array_equal(back[f"model.{name}"].read().numpy(), array), name


def test_a_plain_pickle_of_tensors_is_read(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(state))
    source = read_source(tmp_path / "x.pkl")
    assert all(torch.equal(source.state[name], state[name]) for name in state)


def test_a_network_that_was_pickled_whole_is_read(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    whole = torchvision.models.resnet18(weights=None)
    whole.load_state_dict({**state, "fc.weight": whole.fc.weight, "fc.bias": whole.fc.bias})
    torch.save({"model": whole, "epoch": 3}, tmp_path / "x.pth")
    source = read_source(tmp_path / "x.pth")
    assert all(torch.equal(source.state[name], state[name]) for name in state)
    assert "not made  objects of" in source.tensor_report.summary()
    assert "torchvision.models.resnet.ResNet" in source.tensor_report.summary()


@pytest.mark.slow
def test_arrays_that_hold_objects_are_refused_where_they_matter(resnet18: Path, tmp_path: Path) -> None:
    """numpy's own restoring takes a pointer out of such a file."""
    state, _ = load_backbone(resnet18)
    path = tmp_path / "x.pkl"
    for value in (np.array([{}], dtype=object), np.array(["a"]), np.zeros(2, dtype="V8")):
        path.write_bytes(pickle.dumps({**state, "bn1.weight": value}))
        with pytest.raises(
            CheckpointError, match=r"refused: bn1\.weight is an array of objects or texts \(numpy\.dtype"
        ):
            read_source(path)
        path.write_bytes(pickle.dumps({"model": state, "optimizer": value}))
        assert len(read_source(path).tensor_report.used) == len(state)


ODD = {
    "meta": (torch.zeros(64, device="meta"), "without numbers"),
    "sparse": (torch.eye(64).to_sparse(), "sparse tensor"),
    "quantised": (torch.quantize_per_tensor(torch.zeros(64), 0.1, 0, torch.qint8), "quantised tensor"),
    "expanded": (torch.zeros(1).expand(64), "64 numbers of which only 1"),
    "none": (None, "None where a tensor should be"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_ordinary_tensor_is_named(kind: str, resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    value, said = ODD[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of what it will not offer any more
        path = save(tmp_path, {"state_dict": {**state, "bn1.weight": value}})
        with pytest.raises(CheckpointError, match=rf"refused: state_dict\.bn1\.weight is .*{said}"):
            read_source(path)
        beside = save(tmp_path, {"state_dict": state, "optimizer": {"a": value, "b": torch.zeros(2)}})
    assert len(read_source(beside).tensor_report.used) == len(state)


def test_one_flipped_bit_is_noticed(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    path = save(tmp_path, state)
    content = bytearray(path.read_bytes())
    for place in (len(content) // 2, len(content) // 3):
        damaged = bytearray(content)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"truncated or not a checkpoint \(the record \S+ is damaged"):
            read_source(path)
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        path = save(tmp_path, state)
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    assert len(read_source(path).tensor_report.used) == len(state)


def _shared(depth: int, leaf: object, key: bool = False) -> object:
    value: object = leaf
    for _ in range(depth):
        value = (value, value) if key else [value, value]
    return value


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "shared references": (lambda: pickle.dumps({"a": _shared(90, np.zeros(1))}), "more than 100,000 tensors"),
    "shared references without tensors": (lambda: pickle.dumps({"a": _shared(90, 1)}), "holds no tensors"),
    "shared references as a key": (lambda: pickle.dumps({0: _shared(60, 1, key=True)}).replace(b"K\x00", b"", 1), "."),
    "deep nesting": (
        lambda: b"\x80\x02" + b"](" * 3000 + b"K\x01" + b"e" * 3000 + b".",
        "nested more than 100 deep|no tens",
    ),
    "memo index": (lambda: b"\x80\x02}r\xff\xff\xff\x7f.", "holds no tensors"),
    "memo text": (lambda: b"}p99999999999999999999\n.", "."),
    "integer": (lambda: pickle.dumps({"a": 1 << (8 * 2_000_000)}), "an integer of 16,000,0.. bits"),
    "integer key": (lambda: pickle.dumps({1 << 80: np.zeros(1)}), "an integer of 81 bits as a key"),
    "long name": (lambda: pickle.dumps({"x" * 5000: np.zeros(1)}), "a name of 5,000 characters"),
    "length": (lambda: b"\x80\x05\x96" + (1 << 60).to_bytes(8, "little") + b".", "truncated or not a checkpoint"),
    "frame": (lambda: b"\x80\x04\x95" + (1 << 60).to_bytes(8, "little") + b"}.", "."),
    "operations": (lambda: b"\x80\x02]" + b"N0" * 1_000_001 + b".", "more than 2,000,000 operations"),
    "extension": (lambda: b"\x80\x02\x82\x01.", "extension code 1"),
    "state for a class": (lambda: b"\x80\x02cxyz\nThing\n}X\x01\x00\x00\x00aK\x01sb.", "a state for what has none"),
    "items for a class": (lambda: b"\x80\x02cxyz\nThing\nX\x01\x00\x00\x00aK\x01s.", "keys for what is no dictionary"),
    "itself": (lambda: b"\x80\x02]q\x00h\x00a.", "holds no tensors"),
    "gzip": (lambda: gzip.compress(b"x"), "compressed with gzip"),
}


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_at_once(bomb: str, tmp_path: Path) -> None:
    content, said = BOMBS[bomb]
    (tmp_path / "x.pkl").write_bytes(content())
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=said):
        read_tensors(tmp_path / "x.pkl")
    assert tracemalloc.get_traced_memory()[1] < 300e6
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["compressed", "torchscript", "npz", "twice", "other"])
def test_other_archives_are_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    said = {
        "compressed": r"compressed \(x/data\.pkl\)",
        "torchscript": "a TorchScript archive",
        "npz": r"numpy arrays \(\.npz\)",
        "twice": "two records of one name",
        "other": "without torch's data.pkl",
    }[kind]
    if kind == "torchscript":
        torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)).save(str(path))
    elif kind == "npz":
        with path.open("wb") as file:
            np.savez(file, a=np.zeros(1))
    else:
        with (
            warnings.catch_warnings(),
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if kind == "compressed" else 0) as z,
        ):
            warnings.simplefilter("ignore")
            for name in {"twice": ("x/data.pkl", "x/data.pkl"), "other": ("a.txt",)}.get(kind, ("x/data.pkl",)):
                z.writestr(name, pickle.dumps({}))
    with pytest.raises(CheckpointError, match=said):
        read_tensors(path)


ACTING = ("posix.system", "builtins.eval", "io.open", "torch.serialization.load", "numpy.load", "importlib.import_module",
          "subprocess.Popen", "torch.hub.load", "builtins.__import__", "runpy.run_path", "shutil.rmtree")  # fmt: skip


@pytest.mark.parametrize("name", ACTING)
def test_functions_that_act_are_refused_wherever_they_stand(name: str, resnet18: Path, tmp_path: Path) -> None:
    module, function = name.rsplit(".", 1)
    named = f"c{module}\n{function}\n"
    path = tmp_path / "x.pkl"
    for program in (
        f"(S'a'\n{named}(S'x'\ntRd.",
        f"(S'optimizer'\n{named}d.",
        f"({named}(S'x'\ntR.",
        f"(S'x'\ni{module}\n{function}\n.",
    ):
        path.write_bytes(program.encode())
        with pytest.raises(CheckpointError, match=rf"refused, .*: {name}\. Nothing of it was run"):
            read_tensors(path)
    path.write_bytes(b"(S'a'\ncbuiltins\ngetattr\n(cnumpy\ndtype\nS'x'\ntRd.")
    with pytest.raises(CheckpointError, match=r"refused, .*: builtins\.getattr"):
        read_tensors(path)


@given(st.binary(max_size=200))
def test_no_bytes_end_in_a_traceback(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pkl"
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            read_tensors(path)


def test_names_from_a_file_are_shown_as_codes(resnet18: Path, tmp_path: Path) -> None:
    state, _ = load_backbone(resnet18)
    path = save(tmp_path, {**state, "evil\x1b[31m\nname\u202e": torch.zeros(1), "layer\u0661.0": torch.zeros(1)})
    with pytest.raises(CheckpointError) as caught:
        read_source(path)
    assert "evil\\x1b[31m\\x0aname\\x202e" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
