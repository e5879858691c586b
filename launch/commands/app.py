"""The console command ``mixmask``.

Commands import what they need inside the function, so ``mixmask --help`` does not load torch. A user error ends with
one message and exit code 2, a failed run with exit code 1.
"""

from __future__ import annotations

import errno
import io
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from mixmask.engine.builtin_configs import config_file
from mixmask.engine.errors import Interrupted, RunFailure, UserError
from mixmask.engine.wording import printable
from mixmask.launch.commands import checkpoints, inputs, results, speed, suites, zoo
from mixmask.launch.commands.command_help import GroupedCommands, show_version
from mixmask.launch.commands.options import Config, DryRun, Force, Overrides, RunDir, Runs
from mixmask.launch.commands.terminal import show

app = typer.Typer(
    cls=GroupedCommands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Errors of a path that the user gave, which are not a failure of the run.
USERS_MISTAKES = (
    errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EROFS
)  # fmt: skip


@app.callback()
def mixmask(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Pretrain ConvNets with MixMask, convert any backbone, and measure how well it transfers."""
    del version


@app.command()
def pretrain(
    config: Config,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    run_dir: RunDir = None,
    dry_run: DryRun = False,
) -> None:
    """Pretrain a backbone without labels. The result is backbone.safetensors in the run directory.

    The same command resumes a stopped or killed run from its last checkpoint. epochs=0 gives the randomly initialised
    backbone, mix.kind=none the framework without a mixture.

    \b
    Example:
      mixmask pretrain cifar100_moco_mixmask data.root=/data/cifar100 epochs=200
    """
    from mixmask.engine.config import load_recipe, to_yaml
    from mixmask.engine.distributed import agreed, session
    from mixmask.engine.progress import say
    from mixmask.pretrain import stage
    from mixmask.pretrain.recipe import PretrainRecipe

    with session() as world:
        plan = agreed(
            lambda: stage.plan(
                load_recipe(PretrainRecipe, config_file(config, "pretrain"), overrides or ()), runs, run_dir
            )
        )
        if dry_run:
            if world.is_writer:
                show(f"{to_yaml(plan.recipe)}\n{plan.describe()}")
            return
        say(plan.describe())
        product = stage.run(plan)
        if world.is_writer:
            show(product)


@app.command()
def transfer(
    config: Config,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    run_dir: RunDir = None,
    dry_run: DryRun = False,
    dump_detectron2_config: Annotated[
        Path | None,
        typer.Option(
            help="Write a detection recipe as Detectron2's YAML, with the backbone beside it, and run nothing."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the files of --dump-detectron2-config.")] = False,
) -> None:
    """Measure how well a backbone transfers: kNN, linear probe, finetuning on a share of the labels, VOC or COCO detection.

    backbone=PATH is our backbone.safetensors or a checkpoint of a known layout. For a foreign one, framework=… and
    method=… label the result. backbone=zoo:NAME is a known checkpoint (mixmask zoo), backbone=hf:OWNER/NAME a model on the
    Hugging Face Hub; both are downloaded once. The metrics are written to record.json in the run directory.

    \b
    Examples:
      mixmask transfer knn backbone=backbone.safetensors data.root=/data/cifar10
      mixmask transfer linear backbone=backbone.safetensors data.root=/data/imagenet lr=10
      mixmask transfer detect_coco backbone=backbone.safetensors engine=detectron2 data.root=/data/coco
    """
    from mixmask.engine.config import to_yaml
    from mixmask.engine.distributed import agreed, session
    from mixmask.engine.progress import say
    from mixmask.transfer import stage
    from mixmask.transfer.recipe import load_transfer_recipe
    from mixmask.transfer.summary import detail_tables

    if dump_detectron2_config is not None:
        from mixmask.transfer.detection import commands

        plan = stage.plan(load_transfer_recipe(config_file(config, "transfer"), overrides or ()), runs, run_dir)
        show(commands.dump_detectron2_config(plan, dump_detectron2_config, force))
        return
    with session() as world:
        plan = agreed(
            lambda: stage.plan(
                load_transfer_recipe(config_file(config, "transfer"), overrides or ()), runs, run_dir, not dry_run
            )
        )
        if dry_run:
            if world.is_writer:
                show(f"{to_yaml(plan.recipe)}\n{plan.describe()}")
            return
        say(plan.describe())
        record = stage.run(plan)
        if world.is_writer:
            for name, value in record.metrics.items():
                if name.count("/") < 2:
                    show(f"{name} {value:.4g}" if "chosen" in name else f"{name} {value:.2f}")
            for table in detail_tables(record.metrics):
                show(f"\n{table}")
            show(plan.run.record_file)


@app.command("show-detections")
def show_detections(
    run: Annotated[Path, typer.Argument(help="The folder of a finished detection run.")],
    out: Annotated[Path, typer.Option(help="The .png or .html to write.")] = Path("detections.png"),
    num: Annotated[int, typer.Option(help="Number of pictures, spread over the test set.", min=1, max=500)] = 16,
    score: Annotated[float, typer.Option(help="Leave out detections with a lower score.", min=0, max=1)] = 0.3,
    force: Force = False,
) -> None:
    """Draw test pictures with the boxes, masks, names and scores that a run found, beside the ground truth.

    \b
    Example:
      mixmask show-detections runs/transfer/voc-detect-1a2b3c4d5e6f --num 16 --out detections.html
    """
    from mixmask.engine.storage import require_output_file
    from mixmask.transfer.detection import commands

    require_output_file(out, force)
    show(commands.show_detections(run, out, num, score))


for _command in (
    inputs.configs,
    inputs.show_views,
    inputs.check_data,
    inputs.pack,
    checkpoints.convert,
    checkpoints.inspect,
    suites.launch,
    suites.status,
    suites.cancel,
    suites.logs,
    results.results,
    results.tables,
    results.compare,
    results.plots,
    results.report,
    results.verify,
    results.card,
    zoo.zoo,
    zoo.push,
    speed.bench,
    speed.estimate,
):
    app.command()(_command)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the demo's data and runs.")] = Path("demo"),
    data_only: Annotated[bool, typer.Option("--data-only", help="Draw the pictures and stop.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run; run nothing.")] = False,
) -> None:
    """Do everything once, small, on synthetic pictures: pretrain, convert, transfer, tabulate.

    \b
    Example:
      mixmask demo --out /tmp/demo
    """
    from mixmask.launch.demo.demo import draw_data, run_demo

    if data_only:
        draw_data(out)
        show(out / "data")
        return
    run_demo(out, dry_run)


@app.command()
def doctor() -> None:
    """Say what this machine has: versions, devices, detection engines, data folders, and how to get what is missing.

    \b
    Example:
      mixmask doctor
    """
    from mixmask.launch.commands.doctor import examine

    show(examine())


def _typed() -> str:
    """The command line as it was typed, quoted for the shell."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def main() -> None:
    """Entry point of the console command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show ± prints its code
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except (UserError, RunFailure) as error:
        show(error.told(), err=True)
        sys.exit(error.exit_code)
    except Interrupted as stop:
        show(f"interrupted: {stop}\n  {_typed()}", err=True)
        sys.exit(128 + stop.signal)
    except KeyboardInterrupt:
        show(f"interrupted at once; the same command resumes from the last checkpoint\n  {_typed()}", err=True)
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        mistake = error.errno in USERS_MISTAKES
        show(f"{'error' if mistake else 'failed'}: {printable(str(error))}", err=True)
        sys.exit(2 if mistake else 1)


if __name__ == "__main__":
    main()
