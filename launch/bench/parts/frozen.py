"""kNN, and linear probes side by side."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from typing_extensions import override

from mixmask.engine.backbones import build_trunk
from mixmask.engine.knn import BLOCK, knn_votes
from mixmask.engine.precision import autocast
from mixmask.launch.bench.machine import Call, Machine
from mixmask.launch.bench.part import LeftOut, Part, Row
from mixmask.launch.bench.setups import SETUPS
from mixmask.transfer.probe import Probe
from mixmask.transfer.probes import Probes

CLASSES, WIDTH, QUERIES = 1000, 2048, 512
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0)


class Frozen(Part):
    """Votes of the nearest neighbours in a bank of ImageNet's size, and a step of 26 probes over a step of one."""

    name = "frozen"
    title = "Frozen features: kNN and linear probes"
    place = 5
    share = 0.1

    @override
    def measure(self, machine: Machine, before: dict[str, list[Row]]) -> Iterator[Row | LeftOut]:
        bank = 1_281_167 if machine.is_gpu and machine.memory > 20 * 10**9 else 100_000
        torch.manual_seed(0)
        yield _neighbours(machine, bank)
        setup = SETUPS[1]
        batch = setup.batch(machine) if machine.is_gpu else 16
        one, many = (_probes(machine, number, batch, setup.crop) for number in (1, 2 * len(RATES)))
        alone, together = machine.time(one, most=6).seconds, machine.time(many, most=6).seconds
        yield Row(f"linear, one probe on ResNet-50, batch {batch}", batch / alone, "images/s")
        yield Row(
            f"linear, {2 * len(RATES)} probes on ResNet-50, batch {batch}", batch / together, "images/s",
            limit=f"{together / alone:.2f} times the step of one probe",
        )  # fmt: skip


def _neighbours(machine: Machine, bank: int) -> Row:
    features, queries = (F.normalize(torch.randn(num, WIDTH, device=machine.device), dim=1) for num in (bank, QUERIES))
    labels = torch.randint(0, CLASSES, (bank,), device=machine.device)
    votes = machine.time(
        lambda: knn_votes(features, labels, queries, num_classes=CLASSES, ks=[200], temperatures=[0.1])
    )
    product = machine.time(lambda: [(queries @ part.T).topk(200) for part in torch.split(features, BLOCK)])
    return Row(
        f"kNN, a bank of {bank:,} × {WIDTH}, k = 200", QUERIES / votes.seconds, "queries/s",
        share=product.seconds / votes.seconds, limit="the bound is one product and one top-k for each block",
    )  # fmt: skip


def _probes(machine: Machine, number: int, batch: int, crop: int) -> Call:
    trunk = build_trunk(SETUPS[1].backbone).to(machine.device).to(memory_format=torch.channels_last)
    every = [Probe(rate, 0.0, norm) for rate in RATES for norm in (False, True)]
    model = Probes(trunk, CLASSES, every[:number]).to(machine.device).train()
    optimizer = torch.optim.SGD(model.heads.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch, 3, crop, crop, device=machine.device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (batch,), device=machine.device)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(machine.device, machine.precision):
            loss = model.loss(model.features(images), labels)
        torch.autograd.backward(loss)
        optimizer.step()
        model.bury(0)

    return step
