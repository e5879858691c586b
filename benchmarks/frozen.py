"""What probes side by side and a large kNN bank cost.

    python -m benchmarks.frozen probes [--batch 64] [--repeats 5]
    python -m benchmarks.frozen knn [--bank 1280000] [--queries 512]

- probes: seconds of a step of 26 linear probes (13 rates, with and without BatchNorm, 1,000 classes) on ResNet-50 at 224
  pixels, over those of a step of one probe on the same batch, one after the other in the same run.
- kNN: seconds and peak memory of the votes for four k and two temperatures over a bank of synthetic features, against one
  fp32 matrix product and top-k of that size (in blocks of queries, as it would not fit otherwise). Each is measured in a
  process of its own, whose peak memory is compared with the size of the bank.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.measure import interleaved, parser, report
from mixmask.engine.backbones import BackboneRecipe, build_trunk
from mixmask.engine.knn import CHUNK, knn_votes, normalize_
from mixmask.transfer.probe import Probe
from mixmask.transfer.probes import Probes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
WIDTH, CLASSES = 2048, 1000


def probes(batch: int, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    trunk = (
        build_trunk(BackboneRecipe(arch="resnet50", stem="standard")).to(DEVICE).to(memory_format=torch.channels_last)
    )
    images = torch.randn(batch, 3, 224, 224, device=DEVICE).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (batch,), device=DEVICE)
    many = [Probe(rate, 0.0, norm) for norm in (False, True) for rate in RATES]

    def step_of(combinations: list[Probe]) -> Any:
        model = Probes(trunk, CLASSES, combinations).to(DEVICE).train()
        groups = [
            {"params": [*head.parameters()], "lr": one.lr} for one, head in zip(combinations, model.heads, strict=True)
        ]
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            model.loss(model.features(images), labels).backward()
            optimizer.step()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        return step

    calls = {"one": step_of(many[5:6]), "26 probes": step_of(many)}
    question = f"Seconds of a step of linear probes on ResNet-50 at 224 pixels, batch {batch}, {CLASSES:,} classes"
    return {"question": question, **interleaved(calls, repeats, "one")}


def knn(what: str, bank: int, queries: int) -> dict[str, float]:
    """Seconds and peak memory in GB of one way of finding neighbours, in this process."""
    generator = torch.Generator().manual_seed(0)
    features = torch.empty(bank, WIDTH)
    for start in range(0, bank, 10_000):
        features[start : start + 10_000] = torch.randn(
            len(features[start : start + 10_000]), WIDTH, generator=generator
        )
    asked = normalize_(torch.randn(queries, WIDTH, generator=generator))
    labels = torch.randint(0, CLASSES, (bank,), generator=generator)
    normalize_(features)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    if what == "votes":
        knn_votes(
            features, labels, asked, num_classes=CLASSES, ks=(10, 20, 100, 200), temperatures=(0.07, 0.1), chunk=CHUNK
        )
    else:
        for part in asked.split(CHUNK):
            (part @ features.T).topk(200, dim=1)
    spent = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": spent,
        "bank_gb": features.numel() * 4 / 1e9,
        "peak_gb": peak * 1024 / 1e9,
        "peak_before_gb": before * 1024 / 1e9,
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument(
        "part", choices=("probes", "knn", "votes", "product"), help="votes and product: in this process, printed"
    )
    made.add_argument("--batch", type=int, default=64)
    made.add_argument("--bank", type=int, default=1_280_000)
    made.add_argument("--queries", type=int, default=512)
    arguments = made.parse_args()
    if arguments.part == "probes":
        command = f"python -m benchmarks.frozen probes --batch {arguments.batch} --repeats {arguments.repeats}"
        report("frozen_probes", command, [probes(arguments.batch, arguments.repeats)], arguments.out)
        return
    sizes = ["--bank", str(arguments.bank), "--queries", str(arguments.queries)]
    if arguments.part != "knn":
        print(json.dumps(knn(arguments.part, arguments.bank, arguments.queries)))
        return
    found: dict[str, list[dict[str, float]]] = {"votes": [], "product": []}
    for _ in range(2):
        for what in found:
            command_line = [sys.executable, "-m", "benchmarks.frozen", what, *sizes]
            done = subprocess.run(command_line, capture_output=True, text=True, check=True)
            found[what].append(json.loads(done.stdout.splitlines()[-1]))
    pairs = zip(found["votes"], found["product"], strict=True)
    answer = {
        "question": f"kNN of {arguments.queries:,} queries in a bank of {arguments.bank:,} × {WIDTH:,}: our votes, and "
        "one matrix product with top-k",
        **found,
        "votes_over_product": [votes["seconds"] / product["seconds"] for votes, product in pairs],
        "peak_over_bank_gb": [one["peak_gb"] - one["bank_gb"] for one in found["votes"]],
    }
    report("frozen_knn", f"python -m benchmarks.frozen knn {' '.join(sizes)}", [answer], arguments.out)


if __name__ == "__main__":
    main()
