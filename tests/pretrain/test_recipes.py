"""Every config of the project, and the paper's tables 8 and 10 typed in by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixmask.engine.builtin_configs import configs_folder
from mixmask.engine.config import load_recipe
from mixmask.pretrain.mixtures.erase import Erase
from mixmask.pretrain.mixtures.mixmask import MixMask
from mixmask.pretrain.mixtures.mixmask_unmix import MixMaskUnMix
from mixmask.pretrain.mixtures.none import NoMix
from mixmask.pretrain.mixtures.unmix import UnMix
from mixmask.pretrain.recipe import PretrainRecipe

FOLDER = configs_folder() / "pretrain"

# column of the paper's table 8 (CIFAR-100 and Tiny-ImageNet) or 10 (ImageNet-1K)
SMALL = {"epochs": 1000, "batch_size": 512, "arch": "resnet18", "stem": "cifar"}
TABLE = {
    "moco": {**SMALL, "optimizer": "sgd", "lr": 0.06, "momentum": 0.9, "weight_decay": 5e-4, "warmup": 0, "dim": 128,
             "queue": 4096, "m": 0.99, "temperature": 0.1},
    "simclr": {**SMALL, "optimizer": "adam", "lr": 0.003, "weight_decay": 1e-6, "warmup": 0, "dim": 64, "layers": 2,
               "width": 1024},
    "byol": {**SMALL, "optimizer": "adam", "weight_decay": 1e-6, "warmup": 0, "layers": 2,
             "lr": {"cifar100": 0.003, "tiny_imagenet": 0.002}, "dim": {"cifar100": 64, "tiny_imagenet": 128},
             "width": 1024, "m": 0.99},
    # SimSiam: 0.03 for a batch of 256
    "simsiam": {**SMALL, "optimizer": "sgd", "lr": 0.06, "momentum": 0.9, "weight_decay": 5e-4, "warmup": 10, "dim": 128,
                "layers": 2},
    "mocov2": {"epochs": 200, "batch_size": 256, "arch": "resnet50", "stem": "standard", "optimizer": "sgd", "lr": 0.03,
               "momentum": 0.9, "weight_decay": 1e-4, "warmup": 0, "dim": 128, "queue": 65536, "m": 0.999,
               "temperature": 0.2},
}  # fmt: skip
DATA = {"cifar100": (32, 2), "tiny_imagenet": (64, 4), "imagenet": (224, 8)}  # crop and MixMask's grid (table 1)
MASKS = {"cifar100": "discrete", "tiny_imagenet": "block", "imagenet": "block"}  # table 1's highlighted defaults
BASES = [
    "cifar100_moco",
    "cifar100_simsiam",
    "cifar100_byol",
    "cifar100_simclr",
    "tiny_imagenet_moco",
    "tiny_imagenet_byol",
    "imagenet_mocov2",
]
ROWS = {"": NoMix, "_unmix": UnMix, "_mixmask": MixMask, "_mixmask_unmix": MixMaskUnMix}
PUBLISHED = {  # table 5: Vanilla, Un-Mix, MixMask, MixMask upon Un-Mix
    "cifar100_moco": (65.7, 68.6, 68.4, 70.0),
    "cifar100_simsiam": (66.7, 70.0, 69.8, 70.6),
    "cifar100_byol": (66.8, 70.0, 71.9, 72.1),
    "cifar100_simclr": (67.1, 69.8, 69.2, 70.0),
    "tiny_imagenet_moco": (42.8, 45.3, 47.4, 47.9),
    "tiny_imagenet_byol": (51.4, 52.9, 50.8, 53.7),
    "imagenet_mocov2": (67.5, 68.5, 69.2, 69.5),
}


def read(name: str) -> PretrainRecipe:
    return load_recipe(PretrainRecipe, FOLDER / f"{name}.yaml")


def found(recipe: PretrainRecipe) -> dict[str, object]:
    """The recipe's values under the table's names."""
    framework = recipe.framework.model_dump()
    optimizer = recipe.optimizer.model_dump()
    values = {
        "epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "arch": recipe.backbone.arch,
        "stem": recipe.backbone.stem,
        "optimizer": optimizer["kind"],
        "lr": recipe.optimizer.rate(recipe.batch_size),
        "momentum": optimizer.get("momentum"),
        "weight_decay": optimizer["weight_decay"],
        "warmup": recipe.warmup_epochs,
        "dim": framework["dim"],
        "queue": framework.get("queue_size"),
        "m": framework.get("momentum"),
        "temperature": framework.get("temperature"),
        "layers": framework.get("projector_layers"),
        "width": framework.get("projector_width"),
    }
    return values


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("row", ROWS)
def test_recipes_are_the_papers(base: str, row: str) -> None:
    recipe = read(base + row)
    data, framework = base.rsplit("_", 1)
    assert recipe.framework.kind == framework
    values = found(recipe)
    for name, value in TABLE[framework].items():
        expected = value[data] if isinstance(value, dict) else value
        assert values[name] == pytest.approx(expected) if isinstance(expected, float) else values[name] == expected, (
            name
        )
    augment = recipe.augment
    crop, grid = DATA[data]
    assert (augment.crop, augment.scale, augment.flip) == (crop, (0.2, 1.0), 0.5)
    assert (augment.brightness, augment.contrast, augment.saturation, augment.hue) == (0.4, 0.4, 0.4, 0.1)
    assert (augment.jitter_probability, augment.grayscale_probability) == (0.8, 0.2)
    assert augment.blur_probability == (0.5 if data == "imagenet" else 0)
    mix = recipe.mix
    assert isinstance(mix, ROWS[row])
    if isinstance(mix, MixMask | MixMaskUnMix):
        assert (mix.mask, mix.grid, mix.ratio, mix.switch) == (MASKS[data], grid, 0.5, True)
        assert (mix.mask_per, mix.exact_ratio) == ("batch", False)
    if isinstance(mix, MixMask | MixMaskUnMix | UnMix):
        assert mix.mask_groups == (8 if data == "imagenet" else 1)  # the authors' eight devices
    if isinstance(mix, MixMaskUnMix):
        assert mix.permutation == "different"
        assert mix.unmix_prob == 0.5
    if isinstance(mix, UnMix):
        assert mix.unmix_prob == (0 if data == "imagenet" else 0.5)
    if isinstance(mix, MixMask):
        assert mix.partner == "reverse"


@pytest.mark.parametrize("base", BASES)
def test_every_row_is_headed_by_its_command_cost_and_published_number(base: str) -> None:
    for row, value in zip(ROWS, PUBLISHED[base]):
        text = (FOLDER / f"{base}{row}.yaml").read_text()
        assert f"configs/pretrain/{base}{row}.yaml" in text
        assert f"top-1 {value} " in text.replace("(table 5)", " ")
        assert "Cost:" in text
        assert "FLOP" in text
        if row:
            assert len([line for line in text.splitlines() if not line.startswith("#")]) == 4


def test_moco_on_small_images_is_symmetric_and_its_knn_takes_the_head() -> None:
    for base in ("cifar100_moco", "tiny_imagenet_moco"):
        recipe = read(base)
        assert recipe.framework.model_dump()["symmetric"] is True
        assert recipe.monitor is not None
        assert recipe.monitor.features == "head"
        text = (FOLDER / f"{base}.yaml").read_text()
        assert "Inferred" in text
        assert "framework.symmetric=false" in text


def test_what_the_paper_does_not_say_has_options_with_their_source() -> None:
    unmix = read("cifar100_moco_as_unmix").augment
    assert (unmix.scale, unmix.normalization) == ((0.08, 1.0), "cifar10")
    for name in ("cifar100_simclr_as_wmse", "cifar100_byol_as_wmse"):
        recipe = read(name)
        assert recipe.schedule.model_dump() == {
            "kind": "steps",
            "epochs_before_end": (50, 25),
            "gamma": 0.2,
            "warmup_steps": 500,
        }
        assert (recipe.augment.grayscale_probability, recipe.augment.interpolation) == (0.1, "bicubic")
        assert (recipe.optimizer.lr, recipe.framework.model_dump()["dim"]) == (0.003, 64)
    assert read("imagenet_mocov2_mscn").expected == ()


def test_adams_recipes_leave_norms_and_biases_out_of_the_decay() -> None:
    assert not read("cifar100_simclr").optimizer.decay_norm_and_bias
    assert not read("tiny_imagenet_byol").optimizer.decay_norm_and_bias
    assert read("cifar100_simsiam").optimizer.decay_norm_and_bias


# Of other papers, from their code: epochs, batch, kind and rate of the optimizer at that batch, weight decay, warm-up, final
# rate over base rate, who is left out of the decay, linear top-1 of their READMEs.
FIELD = {
    "imagenet_simsiam": (100, 512, "sgd", 0.1, 1e-4, 0, 0, False, 68.1),
    "imagenet_mocov3": (100, 4096, "lars", 9.6, 1e-6, 10, 0, True, 68.9),
    "imagenet_barlowtwins": (1000, 2048, "lars", 1.6, 1e-6, 10, 0.001, True, 73.5),
    "imagenet_vicreg": (1000, 2048, "lars", 1.6, 1e-6, 10, 0.001, True, 73.2),
    "imagenet_swav": (200, 4096, "lars", 4.8, 1e-6, 10, 0.001, False, 73.9),
    "imagenet_dino": (100, 512, "sgd", 0.06, 1e-4, 10, 0, True, None),
    "imagenet_simclr": (100, 4096, "lars", 4.8, 1e-6, 10, 0, True, 64.5),
    "imagenet_byol": (1000, 4096, "lars", 3.2, 1.5e-6, 10, 0, True, 74.4),
}
ASYMMETRIC = (
    1.0,
    0.0,
    0.1,
    0.2,
)  # blur and solarisation of both views, as Barlow Twins', MoCo v3's and DINO's code has it
VIEWS = {  # scale and jitter (brightness, contrast, saturation, hue), interpolation, blur and solarisation
    "imagenet_simsiam": ((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), "bilinear", (0.5, 0.0, 0.5, 0.0)),
    "imagenet_mocov3": ((0.2, 1.0), (0.4, 0.4, 0.2, 0.1), "bilinear", ASYMMETRIC),
    "imagenet_barlowtwins": ((0.08, 1.0), (0.4, 0.4, 0.2, 0.1), "bicubic", ASYMMETRIC),
    "imagenet_vicreg": ((0.08, 1.0), (0.4, 0.4, 0.2, 0.1), "bicubic", ASYMMETRIC),
    "imagenet_swav": ((0.14, 1.0), (0.8, 0.8, 0.8, 0.2), "bilinear", (0.5, 0.0, 0.5, 0.0)),
    "imagenet_dino": ((0.14, 1.0), (0.4, 0.4, 0.2, 0.1), "bicubic", ASYMMETRIC),
    "imagenet_simclr": ((0.08, 1.0), (0.8, 0.8, 0.8, 0.2), "bicubic", (0.5, 0.0, 0.5, 0.0)),
    "imagenet_byol": ((0.08, 1.0), (0.4, 0.4, 0.2, 0.1), "bicubic", ASYMMETRIC),
}


@pytest.mark.parametrize("name", FIELD)
def test_recipes_of_other_papers(name: str) -> None:
    recipe = read(name)
    optimizer = recipe.optimizer
    assert recipe.schedule.kind == "cosine"
    expected = recipe.expected[0].value if recipe.expected else None
    assert FIELD[name] == (
        recipe.epochs, recipe.batch_size, optimizer.kind, pytest.approx(optimizer.rate(recipe.batch_size)),
        optimizer.weight_decay, recipe.warmup_epochs, recipe.schedule.final, not optimizer.decay_norm_and_bias, expected,
    )  # fmt: skip
    first, second = recipe.views[:2]
    assert VIEWS[name] == (
        first.scale, (first.brightness, first.contrast, first.saturation, first.hue), first.interpolation,
        (first.blur_probability, first.solarize_probability, second.blur_probability, second.solarize_probability),
    )  # fmt: skip
    assert (first.jitter_probability, first.grayscale_probability, first.crop) == (0.8, 0.2, 224)
    small = recipe.views[2:]
    assert len(small) == {"imagenet_swav": 6, "imagenet_dino": 8}.get(name, 0)
    assert {(view.crop, view.scale, view.blur_probability, view.solarize_probability) for view in small} <= {
        (96, (0.05, 0.14), 0.5, 0.0)
    }
    assert recipe.export == ("momentum" if name == "imagenet_dino" else "online")


# solo-learn's README: linear top-1 after 1,000 epochs.
SOLO = {
    "cifar10": {"barlowtwins": 92.10, "vicreg": 92.07, "mocov3": 93.10, "dino": 89.52, "swav": 89.17},
    "cifar100": {"barlowtwins": 70.90, "vicreg": 68.54, "mocov3": 68.83, "dino": 66.76, "swav": 64.88},
}
# Its configs: rate for 256, weight decay; scale, brightness, saturation, blur and solarisation of both views.
SOLOS = {
    "barlowtwins": (0.3, 1e-4, 0.08, 0.4, 0.2, 0.0, 0.0, 0.0, 0.2),
    "vicreg": (0.3, 1e-4, 0.2, 0.4, 0.2, 0.0, 0.1, 0.0, 0.1),
    "mocov3": (0.3, 1e-6, 0.08, 0.4, 0.2, 0.0, 0.0, 0.0, 0.2),
    "dino": (0.3, 1e-6, 0.08, 0.4, 0.2, 0.0, 0.0, 0.0, 0.2),
    "swav": (0.6, 1e-6, 0.08, 0.8, 0.8, 0.5, 0.0, 0.5, 0.0),
}


@pytest.mark.parametrize("data", [*SOLO, "tiny_imagenet"])
@pytest.mark.parametrize("framework", SOLOS)
def test_recipes_of_solo_learn(framework: str, data: str) -> None:
    recipe = read(f"{data}_{framework}")
    assert (recipe.data.name, recipe.framework.kind) == (data, framework)
    # Nothing is published for Tiny-ImageNet.
    published = [SOLO[data][framework]] if data in SOLO else []
    assert [one.value for one in recipe.expected] == published
    assert recipe.augment.crop == (32 if data in SOLO else 64)
    assert (recipe.epochs, recipe.batch_size, recipe.warmup_epochs, recipe.optimizer.kind) == (1000, 256, 10, "lars")
    optimizer = recipe.optimizer.model_dump()
    assert (optimizer["trust_coefficient"], optimizer["clip"], optimizer["decay_norm_and_bias"]) == (0.02, True, False)
    first, second = recipe.views
    assert SOLOS[framework] == (
        optimizer["lr"], optimizer["weight_decay"], first.scale[0], first.brightness, first.saturation,
        first.blur_probability, first.solarize_probability, second.blur_probability, second.solarize_probability,
    )  # fmt: skip


# ImageNet-100, scripts/pretrain/imagenet-100: optimizer, rate for 256, weight decay, linear top-1 of its README ("offline");
# scale, saturation, blur and solarisation of both views.
HUNDRED = {
    "barlowtwins": ("lars", 0.3, 1e-4, 80.16, 0.08, 0.2, 1.0, 0.0, 0.1, 0.2),
    "byol": ("lars", 0.5, 1e-6, 80.32, 0.08, 0.2, 1.0, 0.0, 0.1, 0.2),
    "mocov3": ("lars", 0.3, 1e-6, 80.36, 0.08, 0.2, 1.0, 0.0, 0.1, 0.2),
    "dino": ("lars", 0.3, 1e-6, 74.92, 0.08, 0.2, 1.0, 0.0, 0.1, 0.2),
    "simsiam": ("sgd", 0.5, 1e-5, 78.72, 0.08, 0.2, 1.0, 0.0, 0.1, 0.2),
    "swav": ("lars", 0.6, 1e-6, 74.28, 0.08, 0.8, 0.5, 0.0, 0.5, 0.0),
    "simclr": ("lars", 0.3, 1e-4, None, 0.08, 0.8, 0.5, 0.0, 0.5, 0.0),
    "vicreg": ("lars", 0.3, 1e-4, 79.40, 0.2, 0.2, 0.5, 0.1, 0.5, 0.1),
    "mocov2": ("sgd", 0.3, 1e-4, None, 0.2, 0.4, 0.5, 0.0, 0.5, 0.0),
}


@pytest.mark.parametrize("framework", HUNDRED)
def test_recipes_of_imagenet_100(framework: str) -> None:
    recipe = read(f"imagenet100_{framework}")
    assert (recipe.data.name, recipe.framework.kind, recipe.backbone.arch) == ("imagenet100", framework, "resnet18")
    assert (recipe.epochs, recipe.batch_size, recipe.warmup_epochs) == (400, 256, 10)
    assert recipe.optimizer.rate(256) == recipe.optimizer.lr
    first, second = recipe.views
    assert HUNDRED[framework] == (
        recipe.optimizer.kind, recipe.optimizer.lr, recipe.optimizer.weight_decay,
        recipe.expected[0].value if recipe.expected else None, first.scale[0], first.saturation, first.blur_probability,
        first.solarize_probability, second.blur_probability, second.solarize_probability,
    )  # fmt: skip


def test_there_are_no_other_pretraining_recipes() -> None:
    other = {
        "imagenet_densecl",
        "imagenet_mocov2_mscn",
        "cifar100_moco_as_unmix",
        "cifar100_simclr_as_wmse",
        "cifar100_byol_as_wmse",
    }
    small = {f"{data}_{framework}" for data in (*SOLO, "tiny_imagenet") for framework in SOLOS}
    small |= {f"imagenet100_{framework}" for framework in (*HUNDRED, "mocov2_mixmask")}
    expected = {f"{base}{row}" for base in BASES for row in ROWS} | other | FIELD.keys() | small
    assert {path.stem for path in FOLDER.glob("*.yaml")} == expected
    mscn = read("imagenet_mocov2_mscn").mix
    assert isinstance(mscn, Erase)
    assert (mscn.extra_crops, mscn.fill) == (2, "noise")


@pytest.mark.parametrize("ablation", [
    "mix.grid=48", "mix.mask=discrete", "mix.ratio=0.25", "mix.ratio=[0,1]", "mix.ratio=[0.25,0.75]", "mix.switch=false",
    "mix.mask_per=sample", "mix.exact_ratio=true", "mix.partner=random",
])  # fmt: skip
def test_ablations_are_overrides(ablation: str, tmp_path: Path) -> None:
    path = FOLDER / "imagenet_mocov2_mixmask.yaml"
    assert load_recipe(PretrainRecipe, path, [ablation]) != load_recipe(PretrainRecipe, path)


def test_ablations_of_the_joint_method_are_overrides() -> None:
    path = FOLDER / "imagenet_mocov2_mixmask_unmix.yaml"
    for ablation in ("mix.permutation=same", "mix.unmix_prob=0", "mix.unmix_prob=1"):
        assert load_recipe(PretrainRecipe, path, [ablation]) != load_recipe(PretrainRecipe, path)
