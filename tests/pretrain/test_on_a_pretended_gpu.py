"""Steps, but for the backward pass, on tensors that claim to be on a GPU: nothing waits, and operations stay few."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from mixmask.engine.array_images import ArrayImages
from mixmask.engine.augment import Photometric
from mixmask.engine.builtin_configs import config_file
from mixmask.engine.config import load_recipe
from mixmask.engine.job import Part
from mixmask.engine.loader import Batch, BatchPlan, ResidentSource
from mixmask.engine.normalization import _constants
from mixmask.engine.randomness import generator
from mixmask.engine.recording import Recordable, Recorder
from mixmask.pretrain.frameworks.moco.network import MoCo
from mixmask.pretrain.network import Framework
from mixmask.pretrain.optimizers import build_optimizer
from mixmask.pretrain.recipe import PretrainRecipe
from mixmask.pretrain.recorded_step import RecordedSteps, Samples, Values
from mixmask.pretrain.step import batch_parts, sum_of
from tests.pretend_gpu import GPU, Blocked, Pretend, images, moved, pretend
from tests.pretrain.small_runs import BOTH, CONFIG, SMALL_FRAMEWORKS, SMALL_MIXTURES

STEPS = {
    **{name: [framework, BOTH] for name, framework in SMALL_FRAMEWORKS.items()},
    "unmix": ["mix={kind: unmix, mask_groups: 2}"],
    **SMALL_MIXTURES,
    "accumulated": [SMALL_FRAMEWORKS["byol"], "accumulate=2"],
    "grey": ["backbone.in_channels=1", "augment.hue=0", "augment.saturation=0", "augment.grayscale_probability=0"],
}

pytestmark = pytest.mark.slow
T = TypeVar("T")


@pytest.fixture(autouse=True)
def no_constants_of_other_tests() -> Iterator[None]:
    _constants.cache_clear()
    yield
    _constants.cache_clear()  # they are on a GPU that is not there


def step(
    recipe: PretrainRecipe, mode: Pretend, rows: int, prepare: Callable[[Framework], None] = lambda _: None
) -> None:
    """Forward passes and losses of the second step, and what follows the backward pass."""
    torch.manual_seed(0)
    model = recipe.framework.build(recipe.backbone).to(memory_format=torch.channels_last)
    moved(model, mode)
    prepare(model)
    if isinstance(model, MoCo):
        model.position = 0  # read from the buffer once, when a run starts
    views = [images(mode, rows, recipe.backbone.in_channels, view.crop, view.crop) for view in recipe.views]
    batch = Batch(views, images(mode, rows, dtype=torch.int64), 0, list(range(rows)), rows)
    for number in range(2):
        mode.started.clear()
        with torch.no_grad():
            for part in batch_parts(model, recipe, batch, number):
                part()
            model.before_step()
            model.after_step(0.5)


@pytest.mark.parametrize("name", STEPS)
def test_no_step_waits_for_the_device_or_mixes_devices(name: str, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG.replace("ROOT", "nowhere"))
    recipe = load_recipe(PretrainRecipe, file, ["backbone.arch=timm/test_resnet", *STEPS[name]])
    with pretend() as mode:
        step(recipe, mode, recipe.batch_size)
    assert mode.kernels > 100


@pytest.mark.parametrize(
    ("config", "budget"),
    [("cifar100_moco", 660), ("imagenet_mocov2_mixmask", 1290), ("cifar100_byol", 420)],
)
def test_a_step_starts_no_more_operations_than_before(config: str, budget: int) -> None:
    """Forward passes only. Lower the budgets when the step gets shorter."""
    recipe = load_recipe(PretrainRecipe, config_file(Path(config), "pretrain"), ["data.root=nowhere"])
    with pretend() as mode:
        step(recipe, mode, 64)
    assert budget * 0.8 < mode.kernels <= budget


class NeverRecords(Recorder[T]):
    """Runs the passes as they are while they may not ask the host, and counts what they start."""

    def __init__(self, mode: Pretend) -> None:
        super().__init__("the step", lambda: None)
        self.mode, self.inside, self.copies = mode, 0, 0

    def __call__(self, passes: Recordable[T]) -> T:
        before = self.mode.kernels
        with self.values.noted():
            passes.run(passes.inputs, passes.generators)
        with self.values.recorded():
            found = passes.run(passes.inputs, passes.generators)
        self.inside = self.mode.kernels - before
        self.copies = len(passes.inputs) + len(self.values.makes)
        return found


def sum_of_called(parts: Sequence[Part]) -> Values:
    return sum_of([part() for part in parts])


@pytest.mark.parametrize(
    ("config", "budget"), [("cifar100_moco", 23), ("imagenet_mocov2_mixmask", 58), ("cifar100_byol", 28)]
)
def test_few_operations_are_left_outside_of_a_recorded_step(config: str, budget: int) -> None:
    """Augmentation, mixing, copies to the graph's memory, optimizer, queue and moving average."""
    recipe = load_recipe(PretrainRecipe, config_file(Path(config), "pretrain"), ["data.root=nowhere"])
    with pretend() as mode:
        torch.manual_seed(0)
        model = recipe.framework.build(recipe.backbone).to(memory_format=torch.channels_last)
        moved(model, mode)
        if isinstance(model, MoCo):
            model.position = 0
        views = [images(mode, 64, recipe.backbone.in_channels, view.crop, view.crop) for view in recipe.views]
        batch = Batch(views, images(mode, 64, dtype=torch.int64), 0, list(range(64)), 64)
        recorder = NeverRecords[tuple[Values, Samples]](mode)
        steps = RecordedSteps(model, recipe, recorder)
        gradients = {
            parameter: images(mode, *parameter.shape) for parameter in model.parameters() if parameter.requires_grad
        }
        optimizer = build_optimizer(recipe.optimizer, model, recipe.batch_size)
        for group in optimizer.param_groups:
            group["foreach"] = True  # as on a GPU; torch does not recognise a pretended one
        for number in range(2):
            mode.started.clear()
            with torch.no_grad():
                steps(sum_of_called, batch, number, False)
                model.before_step()
                for parameter, gradient in gradients.items():
                    parameter.grad = gradient
                optimizer.step()
                model.after_step(0.5)
        outside = mode.kernels - recorder.inside + recorder.copies
    assert recorder.inside > 300
    assert budget * 0.8 < outside <= budget


def test_a_view_takes_few_operations_from_the_bytes_to_the_network() -> None:
    recipe = load_recipe(PretrainRecipe, config_file(Path("cifar100_moco"), "pretrain"), ["data.root=nowhere"])
    none = torch.zeros(0, dtype=torch.int64)
    stored = ArrayImages((), none, (), Path("nowhere"), torch.zeros(0, 3, 32, 32, dtype=torch.uint8))
    with pretend() as mode:
        source = ResidentSource(stored, torch.device("cpu"))
        source.device, source.pixels, source.labels = GPU, images(mode, 5000, 3, 32, 32, dtype=torch.uint8), none
        source.labels = images(mode, 5000, dtype=torch.int64)
        mode.started.clear()
        batch = next(source.training(BatchPlan(5000, 512, True, 0), [recipe.augment], 0, 1))
        Photometric(recipe.augment)(batch.views[0], generator(0, "x"), batch.rows, batch.total)
    assert mode.started["mixmask.photometric.default"] == 1
    assert mode.kernels <= 15


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (lambda x: x.sum().item(), "needs a value of the device"),
        (lambda x: x[x > 0], "a boolean mask"),
        (lambda x: (x > 0).nonzero(), "needs a value of the device"),
        (lambda x: x + torch.ones(3), "mixes devices"),
        (lambda x: x.cpu(), "copies to the host"),
        (lambda x: torch.ones(3).to(x.device), "blocking copy"),
        (lambda x: x.index_select(0, torch.tensor([1])), "mixes devices"),
    ],
)
def test_the_pretended_gpu_finds(code: object, said: str) -> None:
    assert callable(code)
    with pretend() as mode:
        tensor = images(mode, 3)
        with pytest.raises(Blocked, match=said):
            code(tensor)
