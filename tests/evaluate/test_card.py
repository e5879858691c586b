from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from mixmask.engine.backbones import load_backbone, save_backbone
from mixmask.engine.errors import UserError
from mixmask.engine.head_info import HeadInfo
from mixmask.engine.heads import Head
from mixmask.engine.records import Record
from mixmask.engine.wording import printable
from mixmask.evaluate.card import write_card
from tests.evaluate.made import backbone, laboratory, transfer, write


def folder_of(runs: Path, dataset: str, method: str) -> Path:
    found = (runs / "pretrain").glob(f"{dataset}-*-{method}-*")
    return max(found, key=lambda folder: Record.read(folder / "record.json").pretrain_epochs or 0)


def test_a_card_has_what_a_hub_reads(tmp_path: Path) -> None:
    runs = write(laboratory(), tmp_path)
    text = write_card(folder_of(runs, "imagenet1k", "mixmask"), None, "mit")
    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["license"] == "mit"
    assert metadata["datasets"] == ["imagenet1k"]
    names = {metric["name"] for result in metadata["model-index"][0]["results"] for metric in result["metrics"]}
    assert {"linear top-1", "detection box AP", "1 % of labels top-1"} <= names
    assert "| linear | ImageNet-1K | top-1 | 72.0 | 1 |" in body
    assert "| detection | VOC 2007 | box AP | 57.8 ± 0.2 | 5 |" in body
    for heading in ("Transfer results", "Data", "Training", "Environment", "Limits", "Citation"):
        assert f"\n\n## {heading}\n\n" in body
    for fact in (
        "arXiv:2210.11456",
        "NVIDIA H200",
        "mixmask pretrain ",
        "mix.grid: 8",
        "torchvision.models.resnet50()",
    ):
        assert fact in body
    assert "unmix" not in metadata["tags"]


def test_a_card_without_results_says_so(tmp_path: Path) -> None:
    runs = write([backbone(method="vanilla")], tmp_path)
    text = write_card(folder_of(runs, "cifar100", "vanilla"), None, "unknown")
    assert "No transfer run of this backbone was found." in text
    assert "Cite the work that introduced MoCo." in text


@pytest.mark.parametrize("head", [False, True])
def test_the_code_of_a_card_runs(head: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CIFAR stem, from the file that pretraining writes, with its projection head or without."""
    from tests.conftest import make_backbone

    record = backbone()
    record = record.model_copy(update={"recipe": {**record.recipe, "backbone": {"arch": "resnet18", "stem": "cifar"}}})
    runs = write([record], tmp_path)
    folder = folder_of(runs, "cifar100", "mixmask")
    file = make_backbone(folder / "backbone.safetensors", "resnet18", "cifar")
    if head:
        state, info = load_backbone(file)
        made = HeadInfo(widths=(512, 128), norm=False)
        save_backbone(file, state, info.model_copy(update={"head": made}), Head(made).state_dict())
    code = write_card(folder, None, "mit").split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["model"].conv1.kernel_size == (3, 3)
    assert torch.equal(names["model"].conv1.weight, load_backbone(file)[0]["conv1.weight"])


def test_hostile_names_stay_in_their_place(tmp_path: Path) -> None:
    strange = "x\n---\nlicense: evil\n| a | b |\n```\n<script>"
    record = backbone().model_copy(
        update={"name": strange, "framework": strange, "dataset": strange, "recipe": {"name": strange}}
    )
    folder = tmp_path / "pretrain" / "x"
    folder.mkdir(parents=True)
    record.write(folder / "record.json")
    result = transfer(record, "knn", {"knn/top1": 5.0})
    (tmp_path / "transfer" / "y").mkdir(parents=True)
    result.write(tmp_path / "transfer" / "y" / "record.json")
    text = write_card(folder, None, "mit")
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["license"] == "mit"
    assert metadata["tags"][1] == printable(strange)
    body = text.split("\n---\n", 1)[1]
    assert "<script>" not in body.split("```yaml")[0]
    assert body.count("```") % 2 == 0


def test_mistakes_are_refused(tmp_path: Path) -> None:
    runs = write(laboratory(), tmp_path)
    good = folder_of(runs, "cifar100", "unmix")
    for folder, license, words in (
        (runs, "mit", "no record.json"),
        (next((runs / "transfer").iterdir()), "mit", "a transfer run"),
        (good, "MIT License!", "an identifier was expected"),
    ):
        with pytest.raises(UserError, match=words):
            write_card(folder, None, license)


def test_a_card_says_what_the_images_were_normalised_with(tmp_path: Path) -> None:
    runs = write(laboratory(), tmp_path)
    for dataset, mean in (("imagenet1k", "(0.485, 0.456, 0.406)"), ("cifar100", "(0.4914, 0.4822, 0.4465)")):
        record = folder_of(runs, dataset, "mixmask") / "record.json"
        found = Record.read(record)
        augment = {**found.recipe.get("augment", {}), **({"normalization": "cifar10"} if dataset == "cifar100" else {})}
        found.model_copy(update={"recipe": {**found.recipe, "augment": augment}}).write(record)
        assert f"normalised with the mean {mean}" in write_card(record.parent, None, "mit")
