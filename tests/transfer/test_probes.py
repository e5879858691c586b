"""Linear probes side by side, against separate runs, slow loops and scikit-learn."""

from __future__ import annotations

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mixmask.engine.errors import ConfigError, DataError, Interrupted, RunFailure
from mixmask.engine.images import Images
from mixmask.engine.randomness import generator
from mixmask.transfer import stage
from mixmask.transfer.probe import Probe
from mixmask.transfer.probes import FeatureNorm, Probes
from mixmask.transfer.protocols.linear import LinearRecipe
from mixmask.transfer.recipe import load_transfer_recipe
from mixmask.transfer.selection import split_for_choice
from tests.processes import finish, processes

DATA = "data: {name: shapes, root: ROOT, train: train, test: val, storage: resident}\nevaluation: {resize: null, crop: 32}\n"
LINEAR = (
    f"protocol: linear\nname: lin\n{DATA}augment: {{crop: 32}}\nlr: 1\nbatch_size: 32\nepochs: 2\nmilestones: [1]\n"
)
MANY = ("lr=[0.1,1]", "batch_norm=[false,true]", "weight_decay=[0,0.001]")


def make_plan(shapes: Path, tmp_path: Path, backbone: Path, *overrides: str, runs: str = "runs") -> stage.TransferPlan:
    config = tmp_path / "config.yaml"
    config.write_text(LINEAR.replace("ROOT", str(shapes)))
    return stage.plan(load_transfer_recipe(config, [f"backbone={backbone}", *overrides]), tmp_path / runs)


def recipe(**keys: object) -> LinearRecipe:
    rest = {"protocol": "linear", "name": "x", "backbone": "x", "data": {"name": "d", "root": "r"}}
    return LinearRecipe.model_validate({**rest, **keys})


@pytest.mark.slow
@pytest.mark.parametrize("augment", ["augment.crop=32", "augment=null"])
def test_many_probes_in_one_pass_are_separate_runs(augment: str, shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    """Every probe's held-out accuracy, and the chosen one's test accuracy, are those of a run with this probe alone."""
    few = ("lr=[0.1,1]", "batch_norm=[false,true]", "weight_decay=0.001")
    plan = make_plan(shapes, tmp_path, resnet18, augment, *few)
    record = stage.run(plan)
    assert isinstance(plan.train, Images)
    rest, held = split_for_choice(plan.train, 0.1, 0)
    assert len(held) == 10  # one image of each of ten classes with 12
    assert len(rest) == 110
    probes = plan.recipe.probes
    assert len(probes) == 4
    chosen = tuple(record.metrics[f"linear/chosen_{key}"] for key in ("lr", "weight_decay", "batch_norm"))

    def alone(probe: Probe, images: Images) -> float:
        """Top-1 of a run with one probe, trained on the same images."""
        keys = (f"lr={probe.lr}", f"batch_norm={str(probe.batch_norm).lower()}", f"weight_decay={probe.weight_decay}")
        own = make_plan(shapes, tmp_path, resnet18, augment, *keys, runs=f"{probe}-{len(images)}")
        return stage.run(replace(own, train=rest, test=images)).metrics["linear/top1"]

    for probe in probes:
        assert record.metrics[f"linear/held_out/{probe}"] == pytest.approx(alone(probe, held), abs=1e-5)
        if (probe.lr, probe.weight_decay, float(probe.batch_norm)) == chosen:
            assert record.metrics["linear/top1"] == pytest.approx(alone(probe, plan.test), abs=1e-5)
    best = max(record.metrics[f"linear/held_out/{probe}"] for probe in probes)
    assert record.metrics["linear/held_out"] == best
    assert record.settings["choice"] == "best of 4 on held-out training images"


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "lars"])
def test_weights_of_probes_side_by_side_equal_those_of_one(kind: str) -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(60, 8), torch.randint(0, 3, (60,))
    combinations = [Probe(rate, decay, norm) for norm in (False, True) for rate in (0.05, 0.5) for decay in (0.0, 0.01)]

    def trained(probes: list[Probe]) -> Probes:
        torch.manual_seed(1)
        model = Probes(Trunk(), 3, probes)
        made = recipe(optimizer={"kind": kind}, milestones=[])
        optimizer = made.build_optimizer(model)
        model.train()
        for start in range(0, 60, 20):
            optimizer.zero_grad()
            model.loss(features[start : start + 20], labels[start : start + 20]).backward()
            optimizer.step()
        return model

    together = trained(combinations)
    for number, probe in enumerate(combinations):
        (alone,) = trained([probe]).heads
        assert torch.allclose(together.heads[number].weight, alone.weight, atol=1e-5)
        assert torch.allclose(together.heads[number].bias, alone.bias, atol=1e-5)


class Trunk(torch.nn.Module):
    """Features of 8 numbers."""

    num_features = 8

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


def test_lars_is_its_definition() -> None:
    """You et al. (arXiv:1708.03888), Algorithm 1, in float64; without clipping and for tensors without decay, too."""
    torch.manual_seed(0)
    model = Probes(Trunk(), 3, [Probe(0.5, 0.01, False)]).double()
    made = recipe(optimizer={"kind": "lars", "trust_coefficient": 0.02}, lr=0.5, weight_decay=0.01, milestones=[])
    optimizer = made.build_optimizer(model)
    model.heads[0].bias.data.uniform_(-1, 1)
    weights = {name: value.detach().clone() for name, value in model.heads[0].named_parameters()}
    momentum = {name: torch.zeros_like(value) for name, value in weights.items()}
    features, labels = torch.randn(5, 12, 8, dtype=torch.float64), torch.randint(0, 3, (5, 12))
    for batch, wanted in zip(features, labels, strict=True):
        optimizer.zero_grad()
        model.loss(batch, wanted).backward()
        gradients = {name: value.grad.clone() for name, value in model.heads[0].named_parameters()}
        optimizer.step()
        for name, value in weights.items():
            gradient = gradients[name]
            norm, size = float(value.norm()), float(gradient.norm())
            local = 0.02 * norm / (size + 0.01 * norm) if norm > 0 and size > 0 else 1.0
            momentum[name] = 0.9 * momentum[name] + local * (gradient + 0.01 * value)
            weights[name] = value - 0.5 * momentum[name]
    for name, value in model.heads[0].named_parameters():
        assert torch.allclose(value, weights[name], atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"schedule": "cosine", "epochs": 4}, lambda s: 0.5 * (1 + math.cos(math.pi * (s // 5) / 4))),
        ({"schedule": "cosine", "epochs": 4, "update_every": "step"}, lambda s: 0.5 * (1 + math.cos(math.pi * s / 20))),
        (
            {"schedule": "cosine", "epochs": 4, "update_every": "step", "warmup_epochs": 1},
            lambda s: s / 5 if s < 5 else 0.5 * (1 + math.cos(math.pi * (s - 5) / 15)),
        ),
        ({"milestones": [2, 3], "epochs": 4}, lambda s: 0.1 ** ((s >= 10) + (s >= 15))),
        ({"milestones": [2], "epochs": 4, "warmup_epochs": 0.4}, lambda s: s / 2 if s < 2 else 0.1 ** (s >= 10)),
    ],
)
def test_schedules_against_their_formulas(keys: dict[str, object], expected: object) -> None:
    made = recipe(**{"milestones": [], **keys})
    for step in range(20):
        assert made.factor(step, 5, 20) == pytest.approx(expected(step), abs=1e-12)


def test_feature_norm_is_batch_norm_without_affine_parameters() -> None:
    torch.manual_seed(0)
    ours, theirs = FeatureNorm(6), torch.nn.BatchNorm1d(6, affine=False)
    for _ in range(3):
        batch = torch.randn(9, 6) * 3 + 1
        assert torch.allclose(ours(batch), theirs(batch), atol=1e-5)
    assert torch.allclose(ours.running_var, theirs.running_var, atol=1e-5)
    batch = torch.randn(9, 6)
    assert torch.allclose(ours.eval()(batch), theirs.eval()(batch), atol=1e-5)


def test_the_choice_never_sees_test_labels(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    plan = make_plan(shapes, tmp_path, resnet18, "augment=null", *MANY)
    honest = stage.run(plan)
    assert isinstance(plan.test, Images)
    order = torch.randperm(len(plan.test), generator=generator(0, "shuffle"))
    shuffled = replace(plan.test, targets=plan.test.targets[order.numpy()])
    again = make_plan(shapes, tmp_path, resnet18, "augment=null", *MANY, runs="shuffled")
    other = stage.run(replace(again, test=shuffled))
    chosen = {key: value for key, value in honest.metrics.items() if "chosen" in key or "held_out" in key}
    assert len(chosen) == 3 + 1 + 8
    assert {key: other.metrics[key] for key in chosen} == chosen
    assert other.metrics["linear/top1"] != honest.metrics["linear/top1"]


@pytest.mark.slow
def test_a_probe_that_diverges_leaves_the_others_alone(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    with_it = stage.run(make_plan(shapes, tmp_path, resnet18, "augment=null", "epochs=6", "lr=[0.1,1e30]"))
    without = stage.run(make_plan(shapes, tmp_path, resnet18, "augment=null", "epochs=6", "lr=[0.1,1]"))
    key = "linear/held_out/lr=0.1,weight_decay=0,batch_norm=false"
    assert with_it.metrics[key] == without.metrics[key]
    assert with_it.metrics["linear/held_out/lr=1e+30,weight_decay=0,batch_norm=false"] <= 10 + 1e-9
    assert with_it.metrics["linear/chosen_lr"] == 0.1


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_weights_of_a_dead_probe_stay_finite(kind: str) -> None:
    """Momentum and weight decay go on moving it, and a checkpoint with infinite weights would end the run."""
    torch.manual_seed(0)
    model = Probes(Trunk(), 3, [Probe(0.1, 0.0, False), Probe(1e30, 10.0, False)])
    optimizer = recipe(optimizer={"kind": kind}, milestones=[]).build_optimizer(model)
    features, labels = torch.randn(20, 8), torch.randint(0, 3, (20,))
    for step in range(30):
        optimizer.zero_grad()
        model.loss(features, labels).backward()
        optimizer.step()
        model.bury(step)
        assert model.heads[0].weight.isfinite().all()
    assert model.alive.tolist() == [True, False]
    assert model.heads[1].weight.isfinite().all()


def test_if_every_probe_diverges_the_run_fails(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    plan = make_plan(shapes, tmp_path, resnet18, "augment=null", "epochs=6", "lr=[1e29,1e30]", "weight_decay=10")
    with pytest.raises(RunFailure, match="all 2 probes have diverged; try lower learning rates"):
        stage.run(plan)


@pytest.mark.slow
def test_interrupted_and_resumed_is_undisturbed(
    shapes: Path, tmp_path: Path, resnet18: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = stage.run(make_plan(shapes, tmp_path, resnet18, *MANY, "epochs=3"))
    plan = make_plan(shapes, tmp_path, resnet18, *MANY, "epochs=3", runs="stopped")
    steps = {"left": 5}
    loss = Probes.loss

    def stop_at_the_fifth(self: Probes, *arguments: torch.Tensor) -> torch.Tensor:
        steps["left"] -= 1
        if steps["left"] == 0:
            signal.raise_signal(signal.SIGTERM)
        return loss(self, *arguments)

    monkeypatch.setattr(Probes, "loss", stop_at_the_fifth)
    with pytest.raises(Interrupted):
        stage.run(plan)
    monkeypatch.setattr(Probes, "loss", loss)
    resumed = stage.run(make_plan(shapes, tmp_path, resnet18, *MANY, "epochs=3", runs="stopped"))
    assert resumed.metrics == undisturbed.metrics


@pytest.mark.slow
def test_lbfgs_finds_scikit_learns_minimum(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    from mixmask.transfer.classification import trunk_of
    from mixmask.transfer.features import frozen_features

    plan = make_plan(
        shapes,
        tmp_path,
        resnet18,
        "augment=null",
        "optimizer.kind=lbfgs",
        "epochs=500",
        "milestones=[]",
        "weight_decay=0.01",
    )
    record = stage.run(plan)
    found = {}

    class Setting:
        device, normalization, source = plan.device, plan.normalization, plan.source

    for part in ("train", "test"):
        images = getattr(plan, part)
        found[part] = frozen_features(plan.recipe, Setting(), images, lambda: trunk_of(Setting()))
    model = LogisticRegression(C=1 / (0.01 * 120), max_iter=5000, tol=1e-8)
    model.fit(found["train"][0].double().numpy(), found["train"][1].numpy())
    theirs = 100 * model.score(found["test"][0].double().numpy(), found["test"][1].numpy())
    assert record.metrics["linear/top1"] == pytest.approx(theirs, abs=2.6)  # one of 40 test images


@pytest.mark.slow
def test_two_processes_choose_what_one_does(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(LINEAR.replace("ROOT", str(shapes)))
    for count in (1, 2):
        done = finish(
            processes(
                count, "transfer", str(config), f"backbone={resnet18}", *MANY, "--run-dir", str(tmp_path / str(count))
            )
        )
        assert [code for code, _, _ in done] == [0] * count, done
    one, two = (json.loads((tmp_path / str(count) / "record.json").read_text())["metrics"] for count in (1, 2))
    assert two == pytest.approx(one, abs=10.1)  # one of ten held-out images, one of 40 test images
    logs = [
        [json.loads(line)["loss"] for line in (tmp_path / str(count) / "log.jsonl").read_text().splitlines()]
        for count in (1, 2)
    ]
    assert logs[1] == pytest.approx(logs[0], rel=1e-2)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["lr=[1,1]"], "a list of different values was expected"),
        (["lr=[]"], "a list of different values was expected"),
        (["optimizer.kind=lbfgs"], "augment: null"),
        (["optimizer.nesterov=true", "momentum=0"], "needs a momentum above 0"),
        (["schedule=exponential", "final_lr=0.1", "lr=[1,2]"], "takes one lr"),
        (["warmup_epochs=2"], "must be below epochs 2"),
        (["lr=[1,2]", "batch_size=115"], "the 110 training images that are left"),
    ],
)
def test_what_is_refused(overrides: list[str], said: str, shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        make_plan(shapes, tmp_path, resnet18, *overrides)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lr=-1", "command line: lr: must be greater than 0 (given: -1)"),
        ("lr=abc", "command line: lr: a number was expected (given: 'abc')"),
        ("lr=[1,-1]", "command line: lr.1: must be greater than 0 (given: -1)"),
        ("batch_norm=maybe", "command line: batch_norm: true or false was expected (given: 'maybe')"),
        ("weight_decay=[a]", "command line: weight_decay.0: a number was expected (given: 'a')"),
    ],
)
def test_a_wrong_value_is_said_once_and_in_the_form_that_was_given(
    override: str, said: str, shapes: Path, tmp_path: Path, resnet18: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(shapes, tmp_path, resnet18, override)
    assert str(caught.value) == said


def test_an_empty_held_out_part_is_refused(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    shutil.copytree(shapes, tmp_path / "few")
    for folder in (tmp_path / "few" / "train").iterdir():
        for image in sorted(folder.iterdir())[1:]:
            image.unlink()
    with pytest.raises(DataError, match="the held-out part of the 10 training images is empty"):
        make_plan(tmp_path / "few", tmp_path, resnet18, "lr=[1,2]", "batch_size=2")


def test_the_official_validation_split_is_what_is_held_out(shapes: Path, tmp_path: Path, resnet18: Path) -> None:
    plan = make_plan(shapes, tmp_path, resnet18)
    assert isinstance(plan.train, Images)
    official = torch.zeros(120, dtype=torch.bool)
    official[::3] = True
    images = replace(plan.train, validation=official)
    rest, held = split_for_choice(images, 0.1, 0)
    assert (len(rest), len(held)) == (80, 40)
    assert held.paths == tuple(images.paths[i] for i in range(0, 120, 3))
    assert images.summary()["listing"] != plan.train.summary()["listing"]
