from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mixmask.engine.config import differing_keys, fingerprint_of, identity, load_recipe, to_yaml
from mixmask.engine.errors import ConfigError
from mixmask.pretrain.recipe import PretrainRecipe
from mixmask.transfer.recipe import load_transfer_recipe

CONFIGS = Path(__file__).parents[2] / "configs"
CIFAR = CONFIGS / "pretrain" / "cifar100_moco_mixmask.yaml"


def error(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(PretrainRecipe, path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted((CONFIGS / "pretrain").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_pretraining_config_is_valid(path: Path) -> None:
    load_recipe(PretrainRecipe, path)


@pytest.mark.parametrize(
    "path",
    sorted(
        path
        for path in [*(CONFIGS / "transfer").glob("*.yaml"), *(CONFIGS / "demo").glob("*_*.yaml")]
        if path.stem != "robustness"  # reads the classifier that it is given; see test_robustness
    ),
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_every_transfer_config_is_valid(path: Path) -> None:
    load_transfer_recipe(path, ["backbone=x"])


def test_cifar_recipe_is_the_papers_table_8() -> None:
    recipe = load_recipe(PretrainRecipe, CIFAR)
    assert (recipe.backbone.arch, recipe.backbone.stem) == ("resnet18", "cifar")
    assert recipe.optimizer.rate(recipe.batch_size) == 0.06
    assert (recipe.batch_size, recipe.epochs, recipe.optimizer.weight_decay) == (512, 1000, 5e-4)
    framework = recipe.framework
    assert (framework.dim, framework.momentum, framework.queue_size, framework.temperature) == (128, 0.99, 4096, 0.1)
    assert recipe.mix.kind == "mixmask"
    assert (recipe.mix.grid, recipe.mix.ratio) == (2, 0.5)


def test_imagenet_recipe_is_the_papers_table_10() -> None:
    recipe = load_recipe(PretrainRecipe, CONFIGS / "pretrain" / "imagenet_mocov2_mixmask.yaml")
    framework = recipe.framework
    assert (framework.kind, framework.dim, framework.momentum) == ("mocov2", 128, 0.999)
    assert (framework.queue_size, framework.temperature) == (65536, 0.2)
    assert (recipe.optimizer.lr, recipe.batch_size, recipe.epochs) == (0.03, 256, 200)
    assert recipe.mix.kind == "mixmask"
    assert recipe.mix.grid == 8
    assert (recipe.augment.blur_probability, recipe.augment.blur_sigma) == (0.5, (0.1, 2.0))


def test_linear_rule() -> None:
    assert load_recipe(PretrainRecipe, CIFAR, ["batch_size=256"]).optimizer.rate(256) == pytest.approx(0.03)


def test_unknown_key_names_the_file_and_lists_valid_ones(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"base: {CIFAR}\nmix: {{grdi: 4}}\n")
    message = error(config)
    assert str(config) in message
    assert "'mix.grdi'" in message
    assert "(given: 4)" in message
    assert "Did you mean 'grid'?" in message
    assert "ratio" in message


def test_a_wrong_key_of_one_of_several_kinds_is_told_that_kinds_keys() -> None:
    message = error(CIFAR, "framework.queue_sze=100")
    assert message.startswith("command line: unknown key 'framework.queue_sze'")
    assert "Did you mean 'queue_size'?" in message
    assert "Did you mean 'mix.grid'?" in error(CIFAR, "grid=4")
    assert "Did you mean 'augment.crop'" in error(CIFAR, "crop=4")
    plain = error(CIFAR, "mix.kind=none", "mix.grid=4")
    assert "Another kind has this key: mix.kind=" in plain
    assert "Did you mean" not in plain
    assert "bn_splits" in message
    assert "projector" not in message


def test_override_errors_name_the_command_line() -> None:
    assert error(CIFAR, "epochs=ten").startswith("command line: epochs:")
    assert "given: 'ten'" in error(CIFAR, "epochs=ten")
    assert "expected key=value" in error(CIFAR, "epochs")
    assert "epohcs" in error(CIFAR, "epohcs=3")
    assert error(CIFAR, "mix.kind=mixmsk") == (
        "command line: mix.kind: given 'mixmsk'; valid: 'erase', 'mixmask', 'mixmask+unmix', 'unmix', 'none'. "
        "Did you mean 'mixmask'?"
    )
    assert "Did you mean 'simsiam'?" in error(CIFAR, "framework.kind=simsaim")
    assert "Did you mean 'resnet50'?" in error(CIFAR, "backbone.arch=resnet5O")
    assert "Did you mean 'timm/convnext_tiny'" in error(CIFAR, "backbone.arch=timm/convnext_tny")
    assert "must lie in (0, 1)" in error(CIFAR, "mix.ratio=1.5")


def test_sizes_that_do_not_fit_are_found_before_any_data_is_read() -> None:
    assert "not a multiple of the 1000 keys of a step (batch_size 500, symmetric)" in error(CIFAR, "batch_size=500")
    assert "3584, 4096" not in error(CIFAR, "batch_size=500")
    assert "does not fit an image" in error(CIFAR, "mix.grid=48")
    assert "equal groups" in error(CIFAR, "framework.bn_splits=7")


def test_every_problem_is_reported_at_once() -> None:
    assert len(error(CIFAR, "epohcs=3", "seed=-1").splitlines()) == 2


def test_missing_and_broken_files(tmp_path: Path) -> None:
    assert "no such config file" in error(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1, 2\n")
    assert "not valid YAML" in error(broken)
    broken.write_text("epochs: 1\nepochs: 2\n")
    assert "stands twice" in error(broken)
    broken.write_text("- 1\n")
    assert "mapping" in error(broken)
    broken.write_text("base: broken.yaml\n")
    assert "leads back to itself" in error(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    assert "is not valid UTF-8" in error(broken)


def test_another_kind_replaces_the_whole_mapping() -> None:
    recipe = load_recipe(PretrainRecipe, CIFAR, ["mix.kind=none"])
    assert recipe.mix.kind == "none"


def test_numbers_with_exponents_are_numbers() -> None:
    assert load_recipe(PretrainRecipe, CIFAR, ["optimizer.weight_decay=1e-4"]).optimizer.weight_decay == 1e-4


def test_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe(PretrainRecipe, CIFAR, ["epochs=3"])
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert load_recipe(PretrainRecipe, tmp_path / "recipe.yaml") == recipe


def test_fingerprint_ignores_where_and_how_conveniently() -> None:
    base = identity(load_recipe(PretrainRecipe, CIFAR))
    same = identity(
        load_recipe(PretrainRecipe, CIFAR, ["data.root=/x", "data.num_workers=9", "log_every=1", "name=other"])
    )
    assert fingerprint_of(base) == fingerprint_of(same)
    for override in ("seed=1", "epochs=3", "mix.grid=4", "precision=bf16", "data.name=other", "augment.hue=0.2"):
        assert fingerprint_of(base) != fingerprint_of(identity(load_recipe(PretrainRecipe, CIFAR, [override])))
    assert fingerprint_of(base) != fingerprint_of(base, parent="abc")


def test_differing_keys_are_dotted() -> None:
    a = identity(load_recipe(PretrainRecipe, CIFAR))
    b = identity(load_recipe(PretrainRecipe, CIFAR, ["mix.grid=4", "seed=2"]))
    assert differing_keys(a, b) == ["mix.grid: 2 -> 4", "seed: 0 -> 2"]


@pytest.mark.slow
@given(st.dictionaries(st.text(min_size=1), st.integers() | st.text() | st.booleans()))
def test_fingerprint_does_not_depend_on_the_order_of_keys(tree: dict[str, object]) -> None:
    assert fingerprint_of(tree) == fingerprint_of(dict(reversed(list(tree.items()))))
    assert yaml.safe_load(yaml.safe_dump(tree)) == tree


def test_unknown_protocol_lists_the_known_ones(tmp_path: Path) -> None:
    config = tmp_path / "x.yaml"
    config.write_text("protocol: knnn\n")
    with pytest.raises(ConfigError, match=r"'protocol': there is no protocol 'knnn'; valid: knn, "):
        load_transfer_recipe(config)
    config.write_text("name: x\n")
    with pytest.raises(ConfigError, match="no protocol is given; valid: "):
        load_transfer_recipe(config)


def test_a_preset_without_rates_for_the_share_says_so() -> None:
    with pytest.raises(ConfigError, match=r"preset 'swav' has learning rates for 1, 10 % of labels, not for 100"):
        load_transfer_recipe(CONFIGS / "transfer" / "semisup_100.yaml", ["backbone=x", "preset=swav"])
