from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from mixmask.engine.builtin_configs import configs_folder
from mixmask.engine.config import load_recipe
from mixmask.engine.errors import ConfigError
from mixmask.pretrain import show_views
from mixmask.pretrain.recipe import PretrainRecipe

CONFIG = configs_folder() / "pretrain" / "cifar100_moco_mixmask.yaml"


def recipe(shapes: Path, *overrides: str) -> PretrainRecipe:
    return load_recipe(PretrainRecipe, CONFIG, [f"data.root={shapes}", "data.test=val", *overrides])


@pytest.mark.parametrize(
    ("overrides", "headings"),
    [
        (["mix.kind=none"], []),
        ([], ["MixMask mask", "MixMask mixture", "MixMask switch"]),
        (["mix.switch=false"], ["MixMask mask", "MixMask mixture"]),
        (["mix.kind=unmix"], ["Un-Mix mixture", "Un-Mix switch"]),
        (["mix.kind=erase", "mix.grid=4", "mix.extra_crops=1", "mix.extra_crop=20"],
         ["view 1, erased", "view 2, erased", "small 1, erased"]),
    ],
)  # fmt: skip
def test_columns_follow_the_recipe(shapes: Path, tmp_path: Path, overrides: list[str], headings: list[str]) -> None:
    out = tmp_path / "views.png"
    said = show_views.draw_views(recipe(shapes, *overrides), out, 3)
    expected = ["image", "view 1 (query)", "view 2 (key)", *headings]
    assert said == f"{out}: 3 images × {len(expected)} columns ({', '.join(expected)})"
    with Image.open(out) as picture:
        assert picture.size[0] > 150 * len(expected)
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 100


def test_pictures_are_what_the_captions_say(shapes: Path) -> None:
    columns = {heading: (pictures, captions) for heading, pictures, captions in show_views._columns(recipe(shapes), 4)}
    views: list[Tensor] = columns["view 1 (query)"][0]
    (mask, *_), _ = columns["MixMask mask"]
    kept = mask[0] > 0
    for i, (mixture, caption) in enumerate(zip(*columns["MixMask mixture"])):
        partner = int(caption.rsplit(" ", 1)[1]) - 1
        assert partner == 3 - i
        assert torch.allclose(mixture[:, kept], views[i][:, kept], atol=1e-5)
        assert torch.allclose(mixture[:, ~kept], views[partner][:, ~kept], atol=1e-5)
        assert f"λ {float(kept.double().mean()):.2f}" in caption
    for i, switch in enumerate(columns["MixMask switch"][0]):
        assert torch.allclose(switch[:, ~kept], views[i][:, ~kept], atol=1e-5)


def test_too_many_pictures_for_the_data(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="larger than the data set of 120 images"):
        show_views.draw_views(recipe(shapes), tmp_path / "views.png", 200)
