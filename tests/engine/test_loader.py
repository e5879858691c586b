from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mixmask.engine.augment import as_float
from mixmask.engine.crops import CropRecipe
from mixmask.engine.data import open_split
from mixmask.engine.datasets import DataRecipe
from mixmask.engine.errors import ConfigError, DataError
from mixmask.engine.loader import (
    BatchPlan,
    ImageSource,
    ResidentSource,
    StreamSource,
    check_crop,
    from_workers,
    open_source,
    useful_workers,
)

CPU = torch.device("cpu")
RECIPE = CropRecipe(crop=32, scale=(0.3, 1.0))


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(2, 60),
    batch=st.integers(2, 60),
    drop_last=st.booleans(),
    first=st.integers(0, 40),
)
def test_a_step_has_the_same_images_wherever_the_run_starts(num: int, batch: int, drop_last: bool, first: int) -> None:
    if drop_last and batch > num:
        return
    plan = BatchPlan(num, batch, drop_last, seed=0)
    last = 50
    whole = list(plan.from_step(0, last))
    assert [step for step, _, _ in whole] == list(range(last))
    assert list(plan.from_step(first, last)) == whole[first:]
    epoch = [i for _, e, indices in whole for i in indices if e == 0]
    assert len(set(epoch)) == len(epoch)
    if not drop_last and num % batch != 1:
        assert sorted(epoch) == list(range(num)) or plan.steps_per_epoch > last
    assert all(len(indices) >= min(2, num) for _, _, indices in whole)


def test_epochs_have_different_orders() -> None:
    plan = BatchPlan(100, 10, True, seed=0)
    assert plan.indices(0) != plan.indices(1)
    assert plan.indices(0) != BatchPlan(100, 10, True, seed=1).indices(0)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size 64 is larger than the data set of 10 images"):
        BatchPlan(10, 64, True, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_do_not_depend_on_workers_or_start(shapes: Path, workers: int) -> None:
    images = open_split(DataRecipe(name="shapes", root=str(shapes)), "train")
    plan = BatchPlan(len(images), 16, True, seed=3)
    whole = list(StreamSource(images, 0, CPU).training(plan, [RECIPE] * 2, 0, 4))
    late = list(StreamSource(images, workers, CPU).training(plan, [RECIPE] * 2, 2, 4))
    assert [batch.step for batch in late] == [2, 3]
    for a, b in zip(whole[2:], late):
        assert torch.equal(a.labels, b.labels)
        for x, y in zip(a.views, b.views):
            assert torch.equal(x, y)
    assert not torch.equal(whole[0].views[0], whole[0].views[1])


def test_both_storages_give_the_same_images_and_labels(shapes: Path) -> None:
    images = open_split(DataRecipe(name="shapes", root=str(shapes)), "train")
    plan = BatchPlan(len(images), 16, True, seed=3)
    whole = CropRecipe(crop=32, scale=(1.0, 1.0), aspect=(1.0, 1.0), flip=0)
    sources: list[ImageSource] = [StreamSource(images, 0, CPU), ResidentSource(images, CPU)]
    a, b = (next(iter(source.training(plan, [whole], 0, 1))) for source in sources)
    assert torch.equal(a.labels, b.labels)
    assert (as_float(a.views[0]) - as_float(b.views[0])).abs().max() < 1e-5
    for (x, s), (y, t) in zip(*(source.evaluation(50, None, 32) for source in sources)):
        assert torch.equal(x, y)
        assert torch.equal(s, t)


def test_resident_refuses_crops_that_would_shrink(shapes: Path) -> None:
    data = DataRecipe(name="shapes", root=str(shapes), storage="resident")
    with pytest.raises(ConfigError, match="use a crop of at least 32"):
        check_crop(open_split(data, "train"), data, CropRecipe(crop=16))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_file_is_named_by_workers_too(shapes: Path, tmp_path: Path, workers: int) -> None:
    images = open_split(DataRecipe(name="shapes", root=str(shapes)), "train")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(images.paths[0].read_bytes()[:400])
    damaged = type(images)((broken, *images.paths[1:]), images.labels, images.classes, images.root)
    plan = BatchPlan(len(images), len(images), True, seed=3)
    with pytest.raises(DataError) as caught:
        next(iter(StreamSource(damaged, workers, CPU).training(plan, [RECIPE], 0, 1)))
    assert str(caught.value).startswith(str(broken))
    assert "Traceback" not in str(caught.value)


WORKERS = """
import os, signal, subprocess, sys, time
from torch.utils.data import DataLoader
from mixmask.engine.stopping import outlive_stop_signals

class Numbers:
    def __getitem__(self, index):
        return index, os.getpid()
    def __len__(self):
        return 1000

batches = iter(DataLoader(Numbers(), batch_size=1, num_workers=1, worker_init_fn=outlive_stop_signals))
worker = int(next(batches)[1])
for number in ("TERM", "USR2"):
    subprocess.run(["kill", f"-{number}", str(worker)], check=True)  # from another process than the parent
for _ in range(100):
    next(batches)
os.kill(worker, 0)
print("alive", flush=True)
kept = batches  # an iterator that is never closed: at exit, the parent ends the worker with SIGTERM and waits for it
sys.modules["kept"] = kept
"""


@pytest.mark.slow
def test_workers_outlive_signals_of_others_and_obey_their_parent() -> None:
    done = subprocess.run([sys.executable, "-c", WORKERS], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


@pytest.mark.slow
def test_torchs_warning_of_many_workers_is_said_in_our_words(
    shapes: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    useful_workers.cache_clear()
    data = DataRecipe.model_validate({"name": "x", "root": str(shapes), "num_workers": 65})
    source = open_source(open_split(data, "train"), data, torch.device("cpu"))
    open_source(open_split(data, "train"), data, torch.device("cpu"))
    assert isinstance(source, StreamSource)
    assert capsys.readouterr().err.count("data.num_workers=65: this machine has") == 1
    numbers: Any = list(range(9))
    next(from_workers(DataLoader(numbers, num_workers=9)))
    assert not [warning for warning in recwarn if "DataLoader" in str(warning.message)]


INHERITED = """
import sys
from pathlib import Path
import torch
from mixmask.engine.images import FileImages
from mixmask.engine.loader import StreamSource

paths = sorted(path for path in Path(sys.argv[1]).rglob("*.*") if path.is_file())[:4]
source = StreamSource(FileImages(tuple(paths), [0] * len(paths), ("a",), Path(sys.argv[1])), 1, torch.device("cpu"))
before = "torchvision" in sys.modules
batches = source.evaluation(4, None, 8, "bilinear")
next(batches)
print(before, "torchvision" in sys.modules)
"""


@pytest.mark.slow
def test_workers_inherit_torchvision(shapes: Path) -> None:
    """A worker that had to import it would do so in every pass, which takes seconds."""
    done = subprocess.run(
        [sys.executable, "-c", INHERITED, str(shapes)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["False", "True"]
