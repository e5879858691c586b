"""The two kinds of pretraining that are measured: small pictures and ImageNet."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.builtin_configs import configs_folder
from mixmask.engine.config import load_recipe
from mixmask.launch.bench.machine import Machine
from mixmask.pretrain.recipe import PretrainRecipe

GB = 10**9


@dataclass(frozen=True)
class Setup:
    """A network and a size of images.

    Attributes:
        title: Shown.
        configs: How the names of its configs begin; of two configs of a framework the first one counts.
        backbone: The network.
        crop: Side of the images in pixels.
        batches: Batch on a GPU with at least so many bytes of memory, the largest first.
        on_cpu: Batch on a CPU.
    """

    title: str
    configs: tuple[str, ...]
    backbone: BackboneRecipe
    crop: int
    batches: tuple[tuple[int, int], ...]
    on_cpu: int

    def batch(self, machine: Machine) -> int:
        """The batch for a machine."""
        if not machine.is_gpu:
            return self.on_cpu
        return next((batch for batch, memory in self.batches if machine.memory >= memory), self.batches[-1][0])

    def recipes(self) -> dict[str, str]:
        """The name of the config of every framework that has one, by the framework's ``kind``."""
        found: dict[str, str] = {}
        for prefix in self.configs:
            for kind, name in _configs(prefix):
                found.setdefault(kind, name)
        return found


@cache
def _configs(prefix: str) -> tuple[tuple[str, str], ...]:
    found = []
    for file in sorted((configs_folder() / "pretrain").glob(f"{prefix}*.yaml")):
        recipe = load_recipe(PretrainRecipe, file)
        if not recipe.mix.num_mixtures and not recipe.mix.hides:
            found.append((recipe.framework.kind, file.stem))
    return tuple(found)


SETUPS = (
    Setup(
        "CIFAR ResNet-18, 32 pixels",
        ("cifar100_", "cifar10_"),
        BackboneRecipe(arch="resnet18", stem="cifar"),
        32,
        ((512, 0),),
        32,
    ),
    Setup(
        "ResNet-50, 224 pixels",
        ("imagenet_",),
        BackboneRecipe(arch="resnet50"),
        224,
        ((256, 70 * GB), (128, 35 * GB), (64, 18 * GB), (32, 0)),
        16,
    ),
)
