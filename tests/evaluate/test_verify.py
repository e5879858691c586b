from __future__ import annotations

from pathlib import Path

import pytest

from mixmask.engine.builtin_configs import configs_folder
from mixmask.engine.config import identity, load_recipe
from mixmask.engine.errors import ConfigError, UserError
from mixmask.engine.expected import Expectation
from mixmask.evaluate.collect import Collection, Run
from mixmask.evaluate.layouts import layouts
from mixmask.evaluate.results import Result
from mixmask.evaluate.table import build
from mixmask.evaluate.verify import verify
from mixmask.pretrain.recipe import PretrainRecipe
from mixmask.transfer.recipe import load_transfer_recipe
from tests.evaluate.made import backbone, laboratory, transfer


def collection(*records: object) -> Collection:
    return Collection(Path("runs"), tuple(Run(Path(f"r/{n}"), record) for n, record in enumerate(records)), (), ())


def expecting(value: float, tolerance: float, **more: str) -> Expectation:
    return Expectation.model_validate(
        {"metric": "knn/top1", "value": value, "tolerance": tolerance, "source": "us", **more}
    )


@pytest.mark.parametrize(
    ("measured", "reproduced"), [(69.0, True), (69.5, True), (68.5, True), (69.6, False), (68.4, False), (75.0, False)]
)
def test_a_value_within_the_tolerance_on_either_side_is_reproduced(measured: float, reproduced: bool) -> None:
    record = transfer(backbone(), "knn", {"knn/top1": measured}).model_copy(
        update={"expected": (expecting(69.0, 0.5),)}
    )
    (check,) = verify(collection(record))
    assert check.reproduced is reproduced
    assert ("NOT REPRODUCED" in check.words()) is not reproduced


def test_a_backbone_expects_something_of_its_transfer_runs() -> None:
    linear = Expectation(metric="linear/top1", value=60.0, tolerance=1.0, source="table 5", dataset="cifar100")
    of = backbone().model_copy(update={"expected": (expecting(69.0, 0.5), linear)})
    first, waiting = verify(collection(of))
    assert (first.reproduced, waiting.reproduced) == (None, None)
    assert "not measured yet" in first.words()
    other = transfer(backbone(seed=5), "knn", {"knn/top1": 1.0})
    elsewhere = transfer(of, "linear", {"linear/top1": 1.0}, dataset="cifar10")
    runs = [of, transfer(of, "knn", {"knn/top1": 69.1}), elsewhere, other]
    checks = verify(collection(*runs))
    assert [(check.value, check.reproduced) for check in checks] == [(69.1, True), (None, None)]
    online = of.model_copy(update={"metrics": {**of.metrics, "knn/top1": 10.0}})
    assert verify(collection(online))[0].value == 10.0
    assert verify(collection(online, *runs[1:]))[0].value == 69.1  # a transfer run says more than the monitor


def test_runs_that_expect_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="expects anything"):
        verify(collection(*laboratory()))


CONFIG = """
name: x
expected: {metric: knn/top1, value: 68.4, tolerance: 0.5, source: table 5}
data: {name: c, root: /d, train: train, test: test}
optimizer: {kind: sgd, lr: 0.1}
epochs: 10
batch_size: 16
framework: {kind: simsiam}
"""


def test_an_expectation_holds_for_the_config_as_it_is_written(tmp_path: Path) -> None:
    config = tmp_path / "x.yaml"
    config.write_text(CONFIG)
    extended = tmp_path / "y.yaml"
    extended.write_text("base: x.yaml\nepochs: 20\n")

    def expected(path: Path, *overrides: str) -> list[float]:
        return [one.value for one in load_recipe(PretrainRecipe, path, overrides).expected]

    assert expected(config) == [68.4]
    assert expected(config, "data.root=/elsewhere", "seed=3", "device=cpu", "name=other") == [68.4]
    assert expected(config, "epochs=20") == []
    assert expected(config, "max_steps=20") == []
    assert expected(config, "optimizer.lr=0.2") == []
    assert expected(extended) == []
    own = "expected=[{metric: knn/top1, value: 60, tolerance: 1, source: ours}]"
    assert expected(config, "epochs=20", own) == [60.0]
    with pytest.raises(ConfigError, match=r"expected\.0\.tolerance. is required"):
        expected(config, "expected=[{metric: knn/top1, value: 60, source: ours}]")
    with pytest.raises(ConfigError, match="unknown key"):
        expected(config, "expected=[{metric: knn/top1, value: 60, source: ours, tolerance: 1, unit: percent}]")


def test_a_required_key_from_the_command_line_changes_nothing(tmp_path: Path) -> None:
    config = tmp_path / "knn.yaml"
    config.write_text(
        "protocol: knn\nname: k\ndata: {name: c, root: /d, train: train, test: test}\n"
        "expected: {metric: knn/top1, value: 50, tolerance: 1, source: ours}\n"
    )
    assert load_transfer_recipe(config, ["backbone=b.safetensors"]).expected
    assert not load_transfer_recipe(config, ["backbone=b.safetensors", "k=20"]).expected


def test_every_config_of_table_5_expects_what_the_table_says() -> None:
    from mixmask.evaluate.published import published_numbers

    published = {
        (n.dataset, n.framework, n.method): (n.metric, n.value)
        for n in published_numbers()
        if n.table == "5" and n.source == "paper"
    }
    found = {}
    for path in sorted((configs_folder() / "pretrain").glob("*.yaml")):
        recipe = load_recipe(PretrainRecipe, path)
        for one in recipe.expected:
            if "table 5" in one.source:
                found[recipe.data.name, recipe.framework.kind, recipe.method] = (one.metric, one.value)
    assert found == published


TABLE_5 = [
    ("cifar100", "moco", "cifar100_knn"),
    *(("cifar100", framework, "cifar100_linear") for framework in ("simsiam", "byol", "simclr")),
    ("tiny_imagenet", "moco", "tiny_imagenet_knn"),
    ("tiny_imagenet", "byol", "tiny_imagenet_linear"),
    ("imagenet", "mocov2", "linear"),
]


@pytest.mark.parametrize("mixture", ["", "_unmix", "_mixmask", "_mixmask_unmix"])
@pytest.mark.parametrize(("data", "framework", "measured"), TABLE_5)
def test_the_projects_own_recipes_are_the_papers(data: str, framework: str, measured: str, mixture: str) -> None:
    """What evaluate states of the paper's protocol is what the configs do: their results stand beside the published ones."""
    recipe = load_recipe(PretrainRecipe, configs_folder() / "pretrain" / f"{data}_{framework}{mixture}.yaml")
    probe = load_transfer_recipe(configs_folder() / "transfer" / f"{measured}.yaml", ["backbone=b"])
    metric = f"{probe.protocol}/top1"
    record = transfer(backbone(), probe.protocol, {metric: 50.0}, dataset=probe.data.name).model_copy(
        update={
            "recipe": identity(probe),
            "settings": {},
            "pretraining": identity(recipe),
            "framework": recipe.framework.kind,
            "method": recipe.method,
            "arch": recipe.backbone.arch,
            "pretrain_dataset": recipe.data.name,
            "pretrain_epochs": float(recipe.epochs),
        }
    )
    table = build(layouts()["5"], [Result(Run(Path("r"), record), metric)])
    (cell,) = (cell for line in table.lines for cell in line.cells if cell is not None and cell.results)
    assert cell.published is not None, table.footnotes
    assert cell.published.value == recipe.expected[0].value
    assert all(text.endswith("(the publication does not say)") for _, text in table.footnotes)


def test_a_run_that_was_measured_otherwise_proves_nothing() -> None:
    of = backbone().model_copy(update={"expected": (expecting(68.4, 0.5),)})
    usual = transfer(of, "knn", {"knn/top1": 68.3})
    other = transfer(of, "knn", {"knn/top1": 61.0}, k=20)
    checks = verify(collection(of, usual, other))
    assert [check.reproduced for check in checks] == [True, None]
    assert "k 20 (this row's recipe: 200)" in checks[1].words()
