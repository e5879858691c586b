"""Our losses against solo-learn's (vturrisi/solo-learn, solo/losses)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixmask.pretrain.frameworks.barlow_twins import BarlowTwinsRecipe
from mixmask.pretrain.frameworks.dino.network import DINO
from mixmask.pretrain.frameworks.moco.network import MoCo
from tests.foreign.clones import clone, module_of
from tests.pretrain.small_frameworks import BACKBONE, build, embeddings, rows

LOSSES = clone("solo-learn", "solo") / "solo" / "losses"


def solo(name: str) -> Any:
    """One of its loss modules; with one process its collective operations change nothing."""
    misc = ModuleType("solo.utils.misc")
    misc.gather = misc.concat_all_gather_no_grad = lambda rows, dim=0: rows
    misc.get_rank = lambda: 0
    packages = {key: ModuleType(key) for key in ("solo", "solo.utils")}
    return module_of(LOSSES / f"{name}.py", {**packages, "solo.utils.misc": misc})


def same(ours: Tensor, theirs: Tensor) -> None:
    assert float(ours.mean()) == pytest.approx(float(theirs), rel=1e-6)


def test_barlow_twins() -> None:
    first, second = embeddings(12, 0).float(), embeddings(12, 1).float()
    recipe = BarlowTwinsRecipe(dim=8, projector_width=16, off_diagonal=0.0051, scale=0.1)
    theirs = solo("barlow").barlow_loss_func(first, second, lamb=0.0051, scale_loss=0.1)
    same(recipe.build(BACKBONE).loss(first, second), theirs)


def test_vicreg() -> None:
    first, second = embeddings(12, 0), embeddings(12, 1)
    theirs = solo("vicreg").vicreg_loss_func(first, second, 25.0, 25.0, 1.0)
    ours = build("vicreg").loss(first, second)
    # Its variance terms of the two views are added, where the paper's code takes their mean (a factor of 2 on 25).
    halved = solo("vicreg").vicreg_loss_func(first, second, 25.0, 12.5, 1.0)
    assert float(ours[0]) == pytest.approx(float(halved), rel=1e-6)
    assert float(theirs) >= float(halved)


def test_moco_v2() -> None:
    moco = build("moco").double()
    assert isinstance(moco, MoCo)
    query, key = rows(6, 8, 0), rows(6, 8, 1)
    same(moco.loss(query, key), solo("mocov2plus").mocov2plus_loss_func(query, key, moco.queue.T, 0.2))


def test_moco_v3() -> None:
    query, key = embeddings(6, 0), embeddings(6, 1)
    ours = build("mocov3").loss(F.normalize(query, dim=1), F.normalize(key, dim=1))
    same(ours / 2, solo("mocov3").mocov3_loss_func(query, key, 0.3))  # ours counts for both directions, which are added


def test_simclr() -> None:
    first, second = rows(6, 8, 0), rows(6, 8, 1)
    simclr = build("simclr")
    ours = (simclr.loss(first, second) + simclr.loss(second, first)) / 2
    same(ours, solo("simclr").simclr_loss_func(torch.cat([first, second]), torch.arange(6).repeat(2), 0.3))


def test_byol_and_simsiam() -> None:
    query, key = rows(6, 8, 0), rows(6, 8, 1)
    same(build("byol").loss(query, key) / 2, solo("byol").byol_loss_func(query, key))  # as MoCo v3's
    same(build("simsiam").loss(query, key), solo("simsiam").simsiam_loss_func(query, key))


def test_swav() -> None:
    rng = torch.Generator().manual_seed(0)
    predictions = [torch.rand(5, 12, generator=rng, dtype=torch.float64) for _ in range(2)]
    codes = [torch.rand(5, 12, generator=rng, dtype=torch.float64).softmax(dim=1) for _ in range(2)]
    framework = build("swav")
    ours = (framework.loss(predictions[0], codes[1]) + framework.loss(predictions[1], codes[0])) / 2
    same(ours, solo("swav").swav_loss_func(predictions, codes, 0.1))


def test_dino_and_its_centre() -> None:
    rng = torch.Generator().manual_seed(0)
    student, teacher = (torch.rand(10, 12, generator=rng, dtype=torch.float64) for _ in range(2))
    theirs = solo("dino").DINOLoss(12, 0.04, 0.04, 1, 2)
    theirs.center = torch.rand(1, 12, generator=rng, dtype=torch.float64) / 10
    framework = build("dino")
    assert isinstance(framework, DINO)
    keys = [((half - theirs.center[0]) / 0.04).softmax(dim=1) for half in teacher.chunk(2)]
    first, second = student.chunk(2)
    ours = (framework.loss(second, keys[0]) + framework.loss(first, keys[1])) / 2
    centre = theirs.center * 0.9 + 0.1 * teacher.mean(dim=0)
    same(ours, theirs(student, teacher))
    assert torch.allclose(theirs.center, centre)
