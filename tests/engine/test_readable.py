"""``data.skip_unreadable``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mixmask.engine import readable as module
from mixmask.engine.config import identity
from mixmask.engine.data import open_split
from mixmask.engine.errors import DataError
from tests.engine.containers import packed, recipe
from tests.processes import python


@pytest.fixture
def damaged(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(shapes, tmp_path / "data")
    images = open_split(recipe(tmp_path / "data"), "train")
    for index in (3, 50):
        content = images.paths[index].read_bytes()
        # Both ends are whole, so that only decoding finds it.
        images.paths[index].write_bytes(content[:100] + bytes(len(content) - 200) + content[-100:])
    images.paths[60].write_bytes(b"")
    return tmp_path / "data"


def test_unreadable_images_are_left_out_and_named(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = open_split(recipe(damaged), "train")
    with pytest.raises(DataError):
        everything.check()  # the default refuses
    images = module.readable(everything)
    told = capsys.readouterr().err
    gone = [path for path in everything.paths if path not in images.paths]
    assert everything.paths[60] in gone
    assert len(images) == 120 - len(gone)
    assert f"{len(gone)} of 120 images cannot be read and are left out:" in told
    assert all(str(path) in told for path in gone)
    for index in range(len(images)):
        images.read(index)
    images.check()
    assert "skip_unreadable" in identity(recipe(damaged, skip_unreadable=True))
    assert "skip_unreadable" not in identity(recipe(damaged))


RANKS = """
import sys
from pathlib import Path
from mixmask.engine import distributed
from mixmask.engine.data import open_split
from mixmask.engine.readable import readable
from tests.engine.containers import recipe

with distributed.session() as world:
    images = distributed.agreed(lambda: open_split(recipe(Path(sys.argv[1])), "train"))
    for _ in range(2):
        images = readable(images)
    print(world.rank, len(images), images.summary()["listing"])
"""


@pytest.mark.slow
def test_all_ranks_leave_the_same_images_out(damaged: Path, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = python(2, script, str(damaged))
    assert [code for code, _, _ in done] == [0, 0], done
    alone = module.readable(open_split(recipe(damaged), "train"))
    said = [out.split() for _, out, _ in done]
    assert said == [[str(rank), str(len(alone)), alone.summary()["listing"]] for rank in range(2)]
    assert done[0][2].count("cannot be read and are left out") == 1
    absent = python(2, script, str(tmp_path / "absent"))
    assert [code for code, _, _ in absent] == [2, 2]
    assert "no such data folder" in absent[0][2]


def test_what_was_found_is_remembered_until_a_file_changes(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = module.readable(open_split(recipe(damaged), "train"))
    decoded = module._decoded
    monkeypatch.setattr(module, "_decoded", lambda images: pytest.fail("decoded again"))
    assert module.readable(open_split(recipe(damaged), "train")).paths == first.paths
    calls = []
    monkeypatch.setattr(module, "_decoded", lambda images: (calls.append(len(images)), decoded(images))[1])
    everything = open_split(recipe(damaged), "train")
    everything.paths[60].write_bytes(everything.paths[61].read_bytes())
    again = module.readable(open_split(recipe(damaged), "train"))
    assert calls == [120]
    assert everything.paths[60] in again.paths
    assert len(again) == len(first) + 1


def test_a_damaged_memory_is_not_trusted(damaged: Path, tmp_path: Path) -> None:
    first = module.readable(open_split(recipe(damaged), "train"))
    (file,) = (tmp_path / "cache" / "mixmask").iterdir()
    for text in ("", "[]", '{"num_images": 120}', '{"num_images": 120, "unreadable": [[500, "x"]]}'):
        file.write_text(text)
        assert module.readable(open_split(recipe(damaged), "train")).paths == first.paths


def test_a_cache_that_cannot_be_written_costs_only_time(
    damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(module.readable(open_split(recipe(damaged), "train"))) < 120
    assert "is not remembered" in capsys.readouterr().err


def test_in_shards_and_without_labels(damaged: Path, shapes: Path, tmp_path: Path) -> None:
    folder = module.readable(open_split(recipe(damaged, labels=False), "train"))
    root = packed(shapes, tmp_path / "packed")
    whole = module.readable(open_split(recipe(root), "train"))
    assert len(whole) == 120
    assert folder.classes == ()
    file = root / "train" / "000000.tar"
    content = bytearray(file.read_bytes())
    content[700] ^= 1
    file.write_bytes(content)
    less = open_split(recipe(root), "train")
    with pytest.raises(DataError, match=r"000000\.tar: damaged; the CRC-32 of .* is not the one"):
        [less.read(index) for index in range(20)]
    # The index has not changed, so neither have the images' states: shards are checked when they are written.
    assert torch.equal(less.labels, whole.labels)


def test_nothing_readable_is_an_error(damaged: Path) -> None:
    for path in (damaged / "train").rglob("*"):
        if path.is_file():
            path.write_bytes(b"no image")
    with pytest.raises(DataError, match="none of its 120 images can be read, for example"):
        module.readable(open_split(recipe(damaged), "train"))
