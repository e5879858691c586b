"""What an installation puts where: one top-level name, which disturbs no other package."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.processes import ROOT


@pytest.fixture(scope="module", params=["checkout", "sdist"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from the checkout, where the packages are links, and from the source distribution."""
    folder, source = tmp_path_factory.mktemp("wheel"), ROOT
    if request.param == "sdist":
        command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
        source = str(next(folder.glob("*.tar.gz")))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w"]
    subprocess.run([*command, str(folder), source], check=True, capture_output=True, timeout=120)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_a_wheel_has_nothing_at_its_top_level_but_mixmask(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"mixmask"}
    for name in (
        "__main__.py", "engine/training.py", "pretrain/stage.py", "transfer/stage.py", "evaluate/tables/5.yaml",
        "evaluate/page/report.html.j2", "launch/commands/app.py", "configs/pretrain/imagenet_mocov2_mixmask.yaml",
    ):  # fmt: skip
        assert f"mixmask/{name}" in names
    assert not [name for name in names if "tests" in name or "__pycache__" in name]
    here = [path for path in (Path(ROOT) / "mixmask").rglob("*.py") if "__pycache__" not in path.parts]
    for link in ("engine", "pretrain", "transfer", "evaluate", "launch"):
        here += [Path(ROOT, "mixmask", path.relative_to(ROOT)) for path in (Path(ROOT) / link).rglob("*.py")]
    assert {str(path.relative_to(ROOT)) for path in here} <= {*names}


def test_an_installed_wheel_runs_and_knows_its_configs(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import mixmask; print(mixmask.__file__); "
        f"from mixmask.launch.commands.app import app; app(['configs', 'pretrain'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith(str(tmp_path / "site" / "mixmask"))
    assert "imagenet_mocov2_mixmask" in done.stdout


@pytest.mark.slow
def test_hugging_faces_evaluate_stays_importable(tmp_path: Path) -> None:
    """A package of the same name as one of this project's folders, in the same environment."""
    pytest.importorskip("evaluate", reason="Hugging Face's evaluate is not installed")
    program = "import evaluate, mixmask.evaluate; print(evaluate.__file__); print(mixmask.evaluate.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    theirs, ours = done.stdout.split()
    assert "site-packages" in theirs
    assert "mixmask" in Path(ours).parts


def test_an_editable_install_is_found_beside_a_folder_of_the_same_name(tmp_path: Path) -> None:
    """As when Python is started in the folder that holds the clone."""
    program = "import sys; from hatchling.build import build_editable; build_editable(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True, capture_output=True, timeout=60
    )
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "work" / "mixmask").mkdir(parents=True)
    program = (
        f"import site, sys; sys.path.insert(0, ''); site.addsitedir({str(tmp_path / 'site')!r}); import mixmask; "
        f"import importlib.util; print(mixmask.__file__); "
        f"print(*(importlib.util.find_spec(name) for name in ('engine', 'launch', 'transfer')))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], cwd=tmp_path / "work", capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    file, others = done.stdout.splitlines()
    assert Path(file).resolve() == Path(ROOT).resolve() / "mixmask" / "__init__.py"
    assert others == "None None None"
