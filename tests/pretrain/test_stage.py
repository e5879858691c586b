from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler

from mixmask.engine.backbones import load_backbone
from mixmask.engine.checkpoint import read_checkpoint
from mixmask.engine.config import load_recipe
from mixmask.engine.errors import CheckpointError, ConfigError, DataError, RunDirectoryError, RunFailure
from mixmask.engine.randomness import generator, python_generator
from mixmask.engine.records import Record
from mixmask.pretrain import compiling, stage
from mixmask.pretrain.frameworks.moco.network import MoCo
from mixmask.pretrain.mixture import draw_mixtures
from mixmask.pretrain.recipe import PretrainRecipe
from mixmask.pretrain.split_batch_norm import SplitBatchNorm2d
from mixmask.pretrain.step import step_terms
from mixmask.transfer import stage as transfer_stage
from mixmask.transfer.recipe import load_transfer_recipe
from tests.pretrain.small_runs import SMALL_FRAMEWORKS, plan


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_densecl_cannot_be_compiled(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compile: densecl reads the trunk's last map"):
        plan(config, tmp_path, SMALL_FRAMEWORKS["densecl"], "compile=true")


def test_only_a_momentum_encoder_can_be_kept_instead(config: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"export: momentum: simsiam has no momentum encoder; export: online is valid"
    ):
        plan(config, tmp_path, SMALL_FRAMEWORKS["simsiam"], "export=momentum")


@pytest.mark.slow
def test_products_record_and_asking_twice(config: Path, tmp_path: Path) -> None:
    first = plan(config, tmp_path, "epochs=1", "monitor.every_epochs=1", "monitor.k=5")
    product = stage.run(first)
    record = Record.read(first.run.record_file)
    assert record.method == "mixmask"
    assert record.fingerprint == first.fingerprint
    assert 0 <= record.metrics["knn/top1"] <= 100
    assert record.metrics["feature_std"] > 0
    _, info = load_backbone(product)
    assert (info.framework, info.method, info.dataset, info.epochs) == ("mocov2", "mixmask", "shapes", 1)
    before = product.stat().st_mtime_ns
    assert stage.run(plan(config, tmp_path, "epochs=1", "monitor.every_epochs=1", "monitor.k=5")) == product
    assert product.stat().st_mtime_ns == before
    assert {path.name for path in first.run.path.iterdir()} == {
        "recipe.yaml",
        "log.jsonl",
        "backbone.safetensors",
        "record.json",
    }


def test_zero_epochs_give_the_initial_trunk(config: Path, tmp_path: Path) -> None:
    random = plan(config, tmp_path, "epochs=0")
    state, info = load_backbone(stage.run(random))
    assert info.method == "random"
    again, _ = load_backbone(stage.run(plan(config, tmp_path / "again", "epochs=0")))
    other, _ = load_backbone(stage.run(plan(config, tmp_path, "epochs=0", "seed=1")))
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert not torch.equal(state["conv1.weight"], other["conv1.weight"])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "num_terms"), [("none", 1), ("unmix", 3), ("mixmask", 3), ("mixmask+unmix", 5)])
@pytest.mark.parametrize("framework", ["moco", "byol", "swav", "dino", "densecl"])
def test_the_terms_of_equations_4_to_6(framework: str, kind: str, num_terms: int, config: Path, tmp_path: Path) -> None:
    """The step's loss is put together again from single images, with λ counted from the mixtures' pixels."""
    recipe = plan(config, tmp_path, f"mix.kind={kind}", SMALL_FRAMEWORKS[framework]).recipe
    torch.manual_seed(0)
    model = recipe.framework.build(recipe.backbone).eval()  # in eval mode an embedding depends on its own image alone
    rng = torch.Generator().manual_seed(0)
    views = [torch.randn(16, 3, view.crop, view.crop, generator=rng) for view in recipe.views]
    num_small = len(views) - 2
    with torch.no_grad():
        rng = python_generator(recipe.seed, "mask", 7, 0, 0)
        found = list(step_terms(model, recipe.mix, views, rng, generator(0), num_small=num_small))
        clean = model.forward_views(tuple(views), (views[0], views[1]), torch.Generator())
        expected, counted = float(clean.losses.mean()), 1
        for mixture in draw_mixtures(recipe.mix, views[0], python_generator(recipe.seed, "mask", 7, 0, 0)):
            for i in range(16):
                j = mixture.perm.tolist().index(i)  # in mixture j, i is the partner
                for number, weight in ((i, float(mixture.lam[i])), (j, 1 - float(mixture.lam[j]))):
                    query = model.query(mixture.images[number : number + 1])
                    expected += weight / 16 * float(model.loss(query, clean.keys[0][i : i + 1])[0])
            counted += 2
    assert counted == num_terms
    assert [term.name for term in found] == ["clean", *kind.replace("mixmask+unmix", "unmix+mixmask").split("+")][
        : 1 + (num_terms - 1) // 2
    ]
    assert sum(float(term.loss) * term.weight for term in found) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_erased_views_are_the_queries_and_small_crops_more_of_them(config: Path, tmp_path: Path) -> None:
    erased = ["mix.kind=erase", "mix.grid=4", "mix.extra_crops=2", "mix.extra_crop=20"]
    prepared = plan(config, tmp_path, *erased)
    assert [view.crop for view in prepared.recipe.views] == [32, 32, 20, 20]
    model = prepared.recipe.framework.build(prepared.recipe.backbone)
    views = [torch.randn(16, 3, size, size) for size in (32, 32, 20, 20)]
    with torch.no_grad():
        terms = list(step_terms(model, prepared.recipe.mix, views, random.Random(0), generator(0)))
    assert [(term.name, term.weight) for term in terms] == [("erased", 1 / 3), ("small", 1 / 3), ("small", 1 / 3)]
    stage.run(plan(config, tmp_path, *erased, "max_steps=2"))
    assert prepared.recipe.method == "mscn"


def test_what_does_not_fit_is_said_before_anything_is_written(config: Path, shapes: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with pytest.raises(ConfigError, match="larger than the data set of 120 images"):
        plan(config, runs, "batch_size=128", "framework.queue_size=128")
    with pytest.raises(DataError, match="no such data folder"):
        plan(config, runs, f"data.root={tmp_path / 'absent'}")
    with pytest.raises(ConfigError, match="is not a multiple of batch_size"):
        plan(config, runs, "framework.queue_size=100")
    with pytest.raises(ConfigError, match="set monitor: null"):
        plan(config, runs, "monitor.every_epochs=1", "data.test=null")
    with pytest.raises(
        ConfigError, match=r"the warm-up of 7 steps .warmup_epochs. does not leave any of the run's 3 steps"
    ):
        plan(config, runs, "warmup_epochs=1", "max_steps=3")
    assert not runs.exists()


@pytest.mark.slow
def test_a_shortened_run_says_how_much_it_trained(config: Path, tmp_path: Path) -> None:
    short = plan(config, tmp_path, "max_steps=2")
    assert "length    2 steps of 16 (max_steps; 2 epochs × 7 steps would be 14)" in short.describe()
    assert "warning   framework" not in short.describe()
    assert "backbone.stem=cifar is made for them" in short.describe()
    assert (
        "framework.queue_size 160 is more than the 120 training images"
        in plan(config, tmp_path, "framework.queue_size=160").describe()
    )
    _, info = load_backbone(stage.run(short))
    assert info.epochs == Record.read(short.run.record_file).pretrain_epochs == round(2 / 7, 4)
    assert short.lineage == plan(config, tmp_path, "max_steps=2", "seed=3").lineage
    assert short.lineage != plan(config, tmp_path, "max_steps=2", "mix.grid=2").lineage


def test_a_truncated_picture_stops_the_run_before_it_begins(config: Path, shapes: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(shapes, tmp_path / "data")
    victim = next((tmp_path / "data" / "train" / "striped-star").iterdir())
    victim.write_bytes(victim.read_bytes()[:300])
    broken = plan(config, tmp_path / "runs", f"data.root={tmp_path / 'data'}")
    with pytest.raises(DataError, match=str(victim)):
        stage.run(broken)
    assert not broken.run.path.exists()


def test_other_data_under_the_same_name_are_not_mistaken_for_the_same_work(
    config: Path, shapes: Path, tmp_path: Path
) -> None:
    import shutil

    stage.run(plan(config, tmp_path / "runs", "epochs=0"))
    shutil.copytree(shapes, tmp_path / "data")
    next((tmp_path / "data" / "train" / "striped-star").iterdir()).unlink()
    with pytest.raises(RunDirectoryError, match=r"other data under the same data\.name"):
        stage.run(plan(config, tmp_path / "runs", "epochs=0", f"data.root={tmp_path / 'data'}"))


def test_a_run_directory_of_another_recipe(config: Path, tmp_path: Path) -> None:
    recipe = load_recipe(PretrainRecipe, config, ["epochs=0"])
    stage.run(stage.plan(recipe, tmp_path, tmp_path / "mine"))
    other = load_recipe(PretrainRecipe, config, ["epochs=0", "seed=5"])
    with pytest.raises(RunDirectoryError, match="seed: 0 -> 5"):
        stage.plan(other, tmp_path, tmp_path / "mine")


def test_a_truncated_checkpoint_is_named(config: Path, tmp_path: Path) -> None:
    broken = plan(config, tmp_path)
    broken.run.create(broken.recipe, broken.fingerprint)
    broken.run.checkpoint_file.write_bytes(b"PK\x03\x04 half")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: truncated or not a checkpoint"):
        stage.run(broken)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(config: Path, tmp_path: Path) -> None:
    bad = plan(config, tmp_path, "optimizer.lr=1e30", "checkpoint_every=1")
    with pytest.raises(RunFailure, match=r"not finite at step \d+ .*learning rate|weights that are not finite"):
        stage.run(bad)
    assert not bad.run.is_finished
    assert not bad.backbone_file.exists()
    if bad.run.checkpoint_file.exists():
        state = read_checkpoint(bad.run.checkpoint_file)["model"]
        assert all(bool(torch.isfinite(value.float()).all()) for value in state.values())


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["timm/convnext_atto", "timm/resnet10t", "resnet34"])
def test_other_trunks_pretrain_and_transfer(arch: str, config: Path, shapes: Path, tmp_path: Path) -> None:
    trunk = [f"backbone.arch={arch}", "backbone.stem=standard"]
    plain = ["framework.bn_splits=1"] if "convnext" in arch else []
    product = stage.run(plan(config, tmp_path, *trunk, *plain, "max_steps=1", "data.num_workers=0"))
    _, info = load_backbone(product)
    assert info.arch == arch
    knn = tmp_path / "knn.yaml"
    knn.write_text(
        f"protocol: knn\nname: knn\ndata: {{name: shapes, root: {shapes}, train: train, test: val, storage: resident}}\n"
        "evaluation: {resize: null, crop: 32}\nk: 5\n"
    )
    transferred = transfer_stage.plan(load_transfer_recipe(knn, [f"backbone={product}"]), tmp_path)
    assert 0 <= transfer_stage.run(transferred).metrics["knn/top1"] <= 100


def test_groups_of_batch_statistics_need_plain_batch_norm(config: Path, tmp_path: Path) -> None:
    for arch, message in (("efficientnet_b0", r"framework\.bn_splits=1"), ("vit_tiny_patch16_224", "attention layers")):
        with pytest.raises(ConfigError, match=message):
            plan(config, tmp_path, f"backbone.arch=timm/{arch}", "backbone.stem=standard")


@pytest.mark.slow
def test_compiled_encoders_train_the_same_network(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo's graphs are run as they are: inductor's code is as exact, but takes a minute to build."""
    overrides = ["max_steps=2", "data.storage=resident"]
    whole = plan(config, tmp_path / "plain", *overrides)
    stage.run(whole)
    compiled: list[str] = []
    original = torch.nn.Module.compile

    def eager(module: torch.nn.Module, **_: object) -> None:
        compiled.append(type(module).__name__)
        original(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    other = plan(config, tmp_path / "compiled", *overrides, "compile=true")
    stage.run(other)
    assert compiled == ["ResNet", "ResNet"]
    ours, theirs = load_backbone(whole.backbone_file)[0], load_backbone(other.backbone_file)[0]
    assert all(torch.allclose(ours[name].float(), theirs[name].float(), atol=1e-4) for name in ours)


@pytest.mark.slow
def test_a_machine_that_cannot_compile_trains_without(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    stage.run(plan(config, tmp_path / "runs", "max_steps=1", "compile=true"))
    assert (
        "compile: true: there is no C++ compiler (install g++, or set CXX), so the encoders run"
        in capfd.readouterr().err
    )


def test_encoders_are_compiled_where_the_gpu_can_do_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **keys: asked.append(keys))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    encoder, device = torch.nn.Linear(2, 2), torch.device("cuda")
    compiling.compile_encoders([encoder], device)
    assert asked == [{"dynamic": False}]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    compiling.compile_encoders([encoder], device)
    assert len(asked) == 1
    assert "compute capability 7.0 or more, this one has 6.1" in capfd.readouterr().err


@pytest.mark.slow
def test_a_compiled_trunk_with_groups_of_statistics_is_compiled_once(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On GPUs the groups pass together; what is done once a step must not make the compiler start again."""

    def forward(layer: SplitBatchNorm2d, images: torch.Tensor) -> torch.Tensor:
        return layer.together(images) if layer.training else torch.nn.BatchNorm2d.forward(layer, images)

    monkeypatch.setattr(SplitBatchNorm2d, "forward", forward)
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs[-1] += 1
        return graph

    torch.compiler.reset()
    recipe = plan(config, tmp_path, "backbone.arch=resnet18").recipe
    eager, compiled = (recipe.framework.build(recipe.backbone) for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    assert isinstance(compiled, MoCo)
    for encoder in compiled.encoders():
        encoder.compile(backend=backend, dynamic=False)
    for number in range(3):
        graphs.append(0)
        views = [torch.randn(16, 3, 32, 32, generator=generator(number, view)) for view in range(2)]
        for model in (eager, compiled):
            for term in step_terms(model, recipe.mix, views, python_generator(number), generator(number)):
                (term.loss * term.weight).backward()
            model.before_step()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.01 * parameter.grad)
                        parameter.grad = None
            model.after_step(0.5)
    assert graphs[0] > 0
    assert graphs[1:] == [0, 0]
    with compiling.uncompiled(compiled):
        for model in (eager, compiled):
            model.eval()
        ours, theirs = (model.trunk(torch.ones(3, 3, 32, 32)) for model in (eager, compiled))
    assert sum(graphs) == graphs[0]  # another size, and nothing was compiled
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(value, compiled.state_dict()[name], atol=1e-3, rtol=1e-3)


def test_what_a_machine_or_a_framework_cannot_do_is_said_early(config: Path, tmp_path: Path) -> None:
    for overrides, message in (
        (["precision=fp16", "device=cpu"], "fp16 needs a GPU"),
        (["sync_bn=true"], "MoCo shuffles batches to avoid"),
        (["accumulate=3"], "batch_size 16 is not a multiple of accumulate 3"),
        (["accumulate=8"], "leaves 1 image per group"),
        (["accumulate=16", "framework.kind=byol"], "leaves 1 image per part"),
        (["mix.grid=33"], "mix.grid 33 does not fit an image"),
        (
            ["mix.kind=erase", "mix.grid=20", "mix.extra_crops=1", "mix.extra_crop=16"],
            "does not fit a view",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            plan(config, tmp_path, *overrides)
