"""Data that the tests make for themselves, with the demo's generator and real on-disk formats."""

from __future__ import annotations

import os
from pathlib import Path

# Several workers and the jobs they start share the cores: one thread each, before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from mixmask.engine.backbones import BackboneInfo, BackboneRecipe, build_trunk, save_backbone
from mixmask.engine.provenance import Code
from mixmask.launch.demo import demo_data
from tests.skipped import reason_of, summary

settings.register_profile("shared machine", deadline=None)  # an example may take long while others use the cores
settings.load_profile("shared machine")


def pytest_report_header() -> str:
    """Say whether Detectron2 is there: its tests are skipped, with the reason, when it is not."""
    try:
        import detectron2
    except ImportError as error:
        return f"detectron2: not importable ({error}), its tests are skipped"
    return f"detectron2: {detectron2.__file__}"


REAL = {  # fixtures that start a real component, and the group of tests that one worker runs one after another
    "cluster": "slurm",
    "slurm_that_loses_nodes": "slurm",
    "slurm_with_accounting": "slurm",
    "browser": "browser",
}


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        groups = {REAL[name] for name in getattr(item, "fixturenames", ()) if name in REAL}
        if item.path.name.endswith("on_slurm.py"):  # some ask for their cluster while they run
            groups.add("slurm")
        for group in groups:
            item.add_marker(pytest.mark.real)
            item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Groups that are not in force start two SLURMs beside each other."""
    if getattr(session.config.option, "loadgroup", False):
        for item in session.items:
            if item.get_closest_marker("xdist_group") and "@" not in item.nodeid:
                pytest.exit(
                    f"pytest {pytest.__version__}: xdist_group is not in force; install pytest<9.2", returncode=4
                )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = [reason_of(report) for report in terminalreporter.stats.get("skipped", [])]
    if reasons:
        terminalreporter.section("skipped, and how to run it")
        for line in summary(reasons):
            terminalreporter.line(line)


@pytest.fixture(autouse=True)
def committed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run directories look the same in a checkout with uncommitted changes."""
    monkeypatch.setattr("mixmask.engine.storage.code", lambda: Code("0" * 40, b""))


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder tree with 10 classes of 32-pixel pictures: 12 for training and 4 for testing in each."""
    root = tmp_path_factory.mktemp("shapes")
    demo_data.write_classification(root, size=32, train_per_class=12, val_per_class=4, seed=1)
    return root


@pytest.fixture(scope="session")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("voc")
    demo_data.write_voc(root, size=(96, 72), train=12, test=4, seed=1)
    return root


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coco")
    demo_data.write_coco(root, size=(96, 72), train=12, val=4, seed=1)
    return root


def make_backbone(path: Path, arch: str = "resnet18", stem: str = "standard", seed: int = 0) -> Path:
    """A backbone file with random weights and batch statistics that are not the initial ones."""
    torch.manual_seed(seed)
    recipe = BackboneRecipe.model_validate({"arch": arch, "stem": stem})
    state = build_trunk(recipe).state_dict()
    for name, tensor in state.items():
        if name.endswith("running_mean"):
            tensor.normal_(std=0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    info = BackboneInfo(
        arch=recipe.arch,
        stem=recipe.stem,
        framework="mocov2",
        method="mixmask",
        fingerprint=f"test{arch}{seed}",
        lineage="test",
        dataset="shapes",
        epochs=1,
        seed=seed,
    )
    save_backbone(path, state, info)
    return path


@pytest.fixture(scope="session")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("resnet18") / "backbone.safetensors")


@pytest.fixture(scope="session")
def resnet50(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("resnet50") / "backbone.safetensors", "resnet50")
