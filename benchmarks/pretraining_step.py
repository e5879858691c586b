"""What a pretraining step costs: against the passes it must make, against lightly, and what MixMask adds.

    python -m benchmarks.pretraining_step [--size 224] [--batch 16] [--repeats 7]

ResNet-50, bf16 where the hardware has it, one process. In one run, interleaved:

- bare: forward and backward of torchvision's ResNet-50 in the same number format and memory order. A MoCo step makes one
  such pass and one forward pass (4/3 of it), a MixMask step two and one (7/3).
- moco, moco with its batch statistics in 8 groups, mixmask, mixmask+unmix: the whole step of this project's loop without
  the loader: losses, backward, optimizer, moving average, queue.
- lightly: the step of lightly's MoCo example (momentum encoder, memory bank, SGD), fp32 as documented.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import nn

from benchmarks.measure import interleaved, parser, report
from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.datasets import DataRecipe
from mixmask.engine.precision import Precision, autocast, fast_bf16
from mixmask.pretrain.frameworks.moco import MoCoRecipe
from mixmask.pretrain.mixture import MixtureRecipe
from mixmask.pretrain.mixtures.mixmask import MixMask
from mixmask.pretrain.mixtures.mixmask_unmix import MixMaskUnMix
from mixmask.pretrain.mixtures.none import NoMix
from mixmask.pretrain.optimizers import SGDRecipe, build_optimizer
from mixmask.pretrain.recipe import PretrainRecipe
from mixmask.pretrain.step import step_terms

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUEUE = 65536


def views(size: int, batch: int) -> list[torch.Tensor]:
    images = torch.randn(2, batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return [view.contiguous(memory_format=torch.channels_last) for view in images]


def done(call: Callable[[], Any]) -> None:
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def ours(mix: MixtureRecipe, bn_splits: int, size: int, batch: int, precision: Precision) -> Callable[[], None]:
    recipe = PretrainRecipe(
        name="bench",
        data=DataRecipe(name="bench", root="bench"),
        framework=MoCoRecipe(queue_size=QUEUE, bn_splits=bn_splits),
        mix=mix,
        optimizer=SGDRecipe(lr=0.01),
        epochs=1,
        batch_size=batch,
    )
    model = recipe.framework.build(BackboneRecipe()).to(DEVICE).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(recipe.optimizer, model, batch)
    images = views(size, batch)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        terms = step_terms(model, recipe.mix, images, random.Random(0), torch.Generator().manual_seed(0))
        while True:
            with autocast(DEVICE, precision):
                term = next(terms, None)
            if term is None:
                break
            (term.loss * term.weight).backward()
        optimizer.step()
        model.after_step(0.5)

    return partial(done, step)


def bare(size: int, batch: int, precision: Precision) -> Callable[[], None]:
    network = torchvision.models.resnet50().to(DEVICE).to(memory_format=torch.channels_last)
    images = views(size, batch)[0]

    def step() -> None:
        network.zero_grad(set_to_none=True)
        with autocast(DEVICE, precision):
            loss = network(images).float().square().mean()
        loss.backward()

    return partial(done, step)


def lightly(size: int, batch: int) -> Callable[[], None]:
    resnet = torchvision.models.resnet50()
    backbone, head = (
        nn.Sequential(*[*resnet.children()][:-1]).to(DEVICE),
        MoCoProjectionHead(2048, 2048, 128).to(DEVICE),
    )
    slow_backbone, slow_head = copy.deepcopy(backbone), copy.deepcopy(head)
    deactivate_requires_grad(slow_backbone)
    deactivate_requires_grad(slow_head)
    criterion = NTXentLoss(memory_bank_size=(QUEUE, 128)).to(DEVICE)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.06)
    first, second = (view.contiguous() for view in views(size, batch))

    def step() -> None:
        update_momentum(backbone, slow_backbone, m=0.99)
        update_momentum(head, slow_head, m=0.99)
        query = head(backbone(first).flatten(start_dim=1))
        key = slow_head(slow_backbone(second).flatten(start_dim=1)).detach()
        loss = criterion(query, key)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return partial(done, step)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--size", type=int, default=224)
    arguments.add_argument("--batch", type=int, default=16)
    given = arguments.parse_args()
    size, batch = given.size, given.batch
    precision: Precision = "bf16" if fast_bf16(DEVICE) else "fp32"
    torch.manual_seed(0)
    calls = {
        "bare": bare(size, batch, precision),
        "moco": ours(NoMix(), 1, size, batch, precision),
        "moco_8_groups": ours(NoMix(), 8, size, batch, precision),
        "mixmask": ours(MixMask(grid=8), 1, size, batch, precision),
        "mixmask+unmix": ours(MixMaskUnMix(grid=8), 1, size, batch, precision),
        "lightly": lightly(size, batch),
    }
    measured = interleaved(calls, given.repeats, "moco")
    rates = {name: batch / values["seconds"] for name, values in measured.items()}
    answers = [
        {
            "question": "images/s of a MoCo v2 ResNet-50 step",
            "size": size,
            "batch": batch,
            "precision": precision,
            "images_per_second": rates,
            "moco_over_lightly": rates["moco"] / rates["lightly"],
            "share_of_the_bound": rates["moco"] / (0.75 * rates["bare"]),
        },
        {
            "question": "what MixMask adds (7 passes over 4 is 1.75, 10 over 4 is 2.5)",
            "mixmask_over_moco": measured["mixmask"]["over_moco"],
            "range": measured["mixmask"]["over_moco_range"],
            "mixmask_unmix_over_moco": measured["mixmask+unmix"]["over_moco"],
        },
        {"question": "all of it", **measured},
    ]
    report(
        "pretraining_step", f"python -m benchmarks.pretraining_step --size {size} --batch {batch}", answers, given.out
    )


if __name__ == "__main__":
    main()
