"""What people read: every link leads somewhere, every command and recipe in it exists, and the notebook runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from mixmask.engine.builtin_configs import configs_folder
from mixmask.launch.commands.app import app
from mixmask.launch.commands.command_help import GROUPS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
COMMANDS = {name for names in GROUPS.values() for name in names}
MADE = ("reference/commands.md", "reference/recipes.md", "reference/configs.md", "reference/zoo.md", "contributing.md")


def shell_lines(page: Path) -> list[str]:
    """Every line of a page that calls mixmask: of shell blocks and of indented ones, continued lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    indented = re.findall(r"^    +(mixmask .*)$", text, re.M)
    lines = [line.strip() for block in blocks for line in block.splitlines()] + indented
    return [re.sub(r"\s{2,}#.*|\s+#\s.*", "", line) for line in lines if line.startswith("mixmask ")]


@cache
def help_of(command: str) -> str:
    runner = CliRunner(env={"COLUMNS": "300", "TERM": "dumb", "NO_COLOR": "1"})
    return runner.invoke(app, [command, "--help"]).output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_options_and_recipes_exist(page: Path) -> None:
    for line in shell_lines(page):
        words = shlex.split(re.split(r"\s*(?:&&|;|\|)\s", line)[0].replace("…", "x"))
        if words[1] in ("--help", "COMMAND"):
            continue
        assert words[1] in COMMANDS, line
        for word in words[2:]:
            if word.startswith("--"):
                assert re.search(rf"(?<![\w-]){re.escape(word.split('=')[0])}(?![\w-])", help_of(words[1])), line
        named = words[2] if len(words) > 2 else ""
        kind = {"pretrain": "pretrain", "transfer": "transfer", "launch": "suites", "estimate": "suites"}.get(words[1])
        if kind and re.fullmatch(r"[a-z0-9_]+", named):
            assert (configs_folder() / kind / f"{named}.yaml").is_file(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """In the repository; those of the site are checked when it is built. Reference pages exist on the site only."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http", "#")):
            continue
        file = target.split("#")[0]
        assert file.endswith(MADE) or (page.parent / file).exists(), target


def test_readme_is_short_and_pictures_are_small() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200
    assert sum(file.stat().st_size for file in (DOCS / "pictures").iterdir()) < 3_000_000


def test_the_headings_of_troubleshooting_are_what_the_code_says() -> None:
    code = "".join(
        file.read_text(encoding="utf-8")
        for package in ("engine", "pretrain", "transfer", "launch", "evaluate")
        for file in sorted((ROOT / package).rglob("*.py"))
    )
    joined = re.sub(r'"\s*\n\s*f?"', "", code)  # messages are split over lines
    headings = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.M)
    assert len(headings) > 20
    assert [heading for heading in headings if heading not in joined] == []


def test_counts_in_the_texts_are_true() -> None:
    from mixmask.pretrain.frameworks import FRAMEWORKS
    from mixmask.transfer.checkpoints.layouts import LAYOUTS
    from mixmask.transfer.zoo.catalogue import catalogue

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    road = (DOCS / "pictures" / "road.svg").read_text(encoding="utf-8")
    assert f"{len(LAYOUTS)} layouts" in readme
    assert f"{len(LAYOUTS)} layouts" in road
    assert f"{len(catalogue())} public ones" in readme
    assert f"{len(catalogue())} known by name" in road
    assert f"{len(FRAMEWORKS.by_name())} frameworks" in road


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    """Links within the site, anchors, the reference from the code: `--strict` makes each warning an error."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, timeout=250, check=False, env=None,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for made in MADE:
        assert (tmp_path / "site" / made.replace(".md", ".html")).stat().st_size > 10_000, made
    outside = [
        (page.name, address)
        for page in (tmp_path / "site").rglob("*.html")
        for address in re.findall(
            r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?)[^"]*)"', page.read_text(encoding="utf-8")
        )
    ]
    assert outside == []  # it can be read without network
    scripts = "".join(file.read_text(encoding="utf-8") for file in (tmp_path / "site").rglob("*.html"))
    assert "unpkg.com" not in scripts
    tutorial = (tmp_path / "site" / "tutorials" / "new_protocol.html").read_text(encoding="utf-8")
    assert "FewShot" in tutorial
    assert "photos-fewshot" in tutorial
    assert "stands here" not in tutorial


def test_every_page_is_in_the_menu() -> None:
    class Loader(yaml.SafeLoader):
        pass

    menu = str(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"])
    for page in DOCS.rglob("*.md"):
        assert page.relative_to(DOCS).as_posix() in menu


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    """With fewer epochs than people get."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "examples" / "first_steps.ipynb", 4)
    (training,) = [cell for cell in notebook.cells if cell.source.startswith("epochs = ")]
    training.source = re.sub(r"epochs = \d+", "epochs = 1", training.source, count=1)
    nbclient.NotebookClient(
        notebook, timeout=250, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    text = str(notebook)
    assert "kNN" in text
    assert "Traceback" not in text
