"""Our losses, queue and kNN in the place of lightly's in its own tests (lightly-ai/lightly, tests)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmask.engine.knn import knn_predict
from mixmask.pretrain.frameworks.barlow_twins import BarlowTwinsRecipe
from mixmask.pretrain.frameworks.moco.network import MoCo
from mixmask.pretrain.frameworks.simclr.network import SimCLR
from tests.foreign.clones import clone, module_of
from tests.pretrain.small_frameworks import BACKBONE, build

pytest.importorskip("lightly")
TESTS = clone("lightly", "lightly_src") / "tests"


def theirs(name: str, **ours: Any) -> Any:
    """One of their test modules, with what it imports from lightly replaced by ours."""
    mock, helpers = ModuleType("pytest_mock"), ModuleType("tests.ddp_helpers")  # for tests that are not run here
    mock.MockerFixture = object
    helpers.NUM_PROCESSES, helpers.USE_PYTEST_POOL = 1, False
    module = module_of(TESTS / f"{name}.py", {one.__name__: one for one in (mock, helpers)})
    for key, value in ours.items():
        assert hasattr(module, key), key
        setattr(module, key, value)
    return module


def cases(test: Any) -> Iterator[dict[str, Any]]:
    """The arguments with which pytest would call one of their tests."""
    marks = [mark.args for mark in test.pytestmark if mark.name == "parametrize"]
    names = [name for name, _ in marks]
    for values in itertools.product(*(values for _, values in marks)):
        yield dict(zip(names, values, strict=True))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 -- their code draws from it


@pytest.fixture(scope="module")
def frameworks() -> tuple[SimCLR, MoCo]:
    simclr, moco = build("simclr"), build("moco")
    assert isinstance(simclr, SimCLR)
    assert isinstance(moco, MoCo)
    return simclr, moco


class Queue:
    """The queue of our MoCo: any size that is a multiple of the batch."""

    def __init__(self, moco: MoCo, size: int) -> None:
        self.moco, self.size, self.empty = moco, size, True

    def begin(self, keys: Tensor) -> None:
        """With random negatives, as ours begins."""
        if self.empty:
            self.empty = False
            self.moco.queue = F.normalize(torch.randn(self.size, keys.shape[1]), dim=1)
            self.moco.recipe = self.moco.recipe.model_copy(update={"queue_size": self.size})
            self.moco.position = 0

    def push(self, keys: Tensor) -> None:
        self.moco.fresh.append(keys.detach())
        self.moco.after_step(0.0)


def nt_xent(frameworks: tuple[SimCLR, MoCo]) -> Any:
    """A class with the interface of theirs: NT-Xent within the batch, or against a queue."""
    simclr, moco = frameworks

    class NTXent:
        def __init__(
            self, temperature: float = 0.5, memory_bank_size: int = 0, gather_distributed: bool = False
        ) -> None:
            self.temperature = temperature
            self.queue = Queue(moco, memory_bank_size) if memory_bank_size else None

        def __call__(self, first: Tensor, second: Tensor) -> Tensor:
            first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
            if self.queue is None:
                simclr.recipe = simclr.recipe.model_copy(update={"temperature": self.temperature})
                return (simclr.loss(first, second) + simclr.loss(second, first)).mean() / 2
            self.queue.begin(second)
            moco.recipe = moco.recipe.model_copy(update={"temperature": self.temperature})
            losses = moco.loss(first, second)
            self.queue.push(second)
            return losses.mean()

    return NTXent


def test_nt_xent(frameworks: tuple[SimCLR, MoCo]) -> None:
    tests = theirs("loss/test_ntx_ent_loss", NTXentLoss=nt_xent(frameworks)).TestNTXentLoss()
    for case in cases(tests.test_with_values):
        tests.test_with_values(**case)
    tests.test_forward_pass()  # the one with a temperature below 0 is left out: recipes refuse it
    tests.test_forward_pass_1d()


def test_nt_xent_against_a_queue(frameworks: tuple[SimCLR, MoCo]) -> None:
    tests = theirs("loss/test_ntx_ent_loss", NTXentLoss=nt_xent(frameworks)).TestNTXentLoss()
    number = 0
    for case in cases(tests.test_with_correlated_embedding):
        if case["memory_bank_size"] % case["n_samples"] == 0:  # the others, ours refuses
            tests.test_with_correlated_embedding(**case)
            number += case["memory_bank_size"] > 0
    assert number > 20


def test_queue(frameworks: tuple[SimCLR, MoCo]) -> None:
    class Bank(Queue):
        def __init__(self, size: int) -> None:
            super().__init__(frameworks[1], size)

        @property
        def bank(self) -> Tensor:
            return self.moco.queue

        def __call__(self, keys: Tensor, update: bool) -> tuple[Tensor, Tensor]:
            self.begin(keys)
            before = self.bank.T.clone()
            if update:
                self.push(keys)
            return keys, before

    (file,) = TESTS.rglob("test_memory_bank.py")
    tests = theirs(str(file.relative_to(TESTS).with_suffix("")), MemoryBankModule=Bank).TestNTXentLoss()
    tests.test_forward_easy()


class Best(list[int]):
    """The classes of a query by their votes, of which ours gives the first."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list) and self[0] == other[0]

    __hash__ = None


def test_knn() -> None:
    class Predicted:
        def __init__(self, labels: Tensor) -> None:
            self.labels = labels

        def tolist(self) -> list[Best]:
            return [Best([label]) for label in self.labels.tolist()]

    def predict(feature: Tensor, feature_bank: Tensor, feature_labels: Tensor, num_classes: int, knn_k: int) -> Any:
        bank = feature_bank.T
        return Predicted(knn_predict(bank, feature_labels, feature, num_classes=num_classes, k=knn_k, temperature=0.1))

    ours = ModuleType("knn")
    ours.knn_predict = predict
    module = theirs("utils/benchmarking/test_knn", knn=ours)
    module.test_knn()
    module.test_knn__knn_k()


class OurBarlowTwins(nn.Module):
    def __init__(self, lambda_param: float = 5e-3, gather_distributed: bool = False) -> None:
        super().__init__()
        recipe = BarlowTwinsRecipe(dim=8, projector_width=16, off_diagonal=lambda_param, scale=1.0)
        self.framework = recipe.build(BACKBONE)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.framework.loss(first, second).mean()


def test_barlow_twins() -> None:
    tests = theirs("loss/test_barlow_twins_loss", BarlowTwinsLoss=OurBarlowTwins).TestBarlowTwinsLoss()
    tests.test__loss_matches_reference_loss()
    tests.test__loss_is_affine_invariant()


def test_vicreg() -> None:
    class OurVICReg:
        def __call__(self, first: Tensor, second: Tensor) -> Any:
            loss = float(build("vicreg").loss(first, second).mean())
            return type("Loss", (), {"item": lambda self: pytest.approx(loss, rel=1e-5)})()

    theirs("loss/test_vicreg_loss", VICRegLoss=OurVICReg).TestVICRegLoss().test_forward__compare()
