"""Pages of the documentation that are made from the code: commands, recipes, configs, the zoo; a hook of mkdocs."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).resolve().parents[1]
SOURCES = "https://arxiv.org/abs/"
SHOWN = {  # comments that stand for a file's content, with its place and its language
    "<!-- the file stands here on the site -->": ("examples/our_lab/our_lab/fewshot.py", "python"),
    "<!-- the recipe stands here on the site -->": ("examples/our_lab/fewshot.yaml", "yaml"),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and the stored results."""
    pages = {
        "reference/commands.md": commands(),
        "reference/recipes.md": recipes(),
        "reference/configs.md": configs(),
        "reference/zoo.md": zoo(),
        "contributing.md": contributing(),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    results = ROOT / "benchmarks" / "results"
    for file in sorted(results.rglob("*")):
        if file.suffix in (".md", ".json", ".png"):
            name = f"results/{file.relative_to(results).as_posix()}"
            text = _plain_links(file.read_text(encoding="utf-8")) if file.suffix == ".md" else None
            made = (
                File.generated(config, name, abs_src_path=str(file))
                if text is None
                else File.generated(config, name, content=text)
            )
            files.append(made)
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """In the repository, links lead to its files; on the site, to the pages that are made of them."""
    back = "../" * page.file.src_uri.count("/")
    root = f"{back}../"
    places = {
        f"({root}benchmarks/results/": f"({back}results/",
        f"({root}CONTRIBUTING.md)": f"({back}contributing.md)",
        f"({root}transfer/zoo/entries)": f"({back}reference/zoo.md)",
    }
    for there, here in places.items():
        markdown = markdown.replace(there, here)
    for mark, (name, kind) in SHOWN.items():
        markdown = markdown.replace(mark, f"```{kind}\n{(ROOT / name).read_text(encoding='utf-8').rstrip()}\n```")
    return re.sub(rf"\[([^\]]+)\]\({re.escape(root)}examples/[^)]*\)", r"\1", markdown)


def _plain_links(text: str) -> str:
    """Links to files of the repository that are no pages, as their text."""

    def shown(found: re.Match[str]) -> str:
        label, target = found[1], found[2]
        return (
            found[0]
            if target.startswith(("http", "#")) or (target.endswith((".json", ".md")) and "/" not in target)
            else label
        )

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", shown, text)


def contributing() -> str:
    """CONTRIBUTING.md."""
    return _plain_links((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def commands() -> str:
    """What ``mixmask COMMAND --help`` prints."""
    from typer.testing import CliRunner

    from mixmask.launch.commands.app import app
    from mixmask.launch.commands.command_help import GROUPS

    runner = CliRunner(env={"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"})
    lines = ["# Commands", "", "As `mixmask COMMAND --help` prints them."]
    for heading, names in GROUPS.items():
        lines += ["", f"## {heading}"]
        for name in names:
            done = runner.invoke(app, [name, "--help"], prog_name="mixmask")
            if done.exit_code != 0:
                raise RuntimeError(f"mixmask {name} --help: {done.output}")
            text = re.sub(r"\x1b\[[0-9;]*m", "", done.output).strip("\n")
            lines += ["", f"### mixmask {name}", "", "```text", *(line.rstrip() for line in text.splitlines()), "```"]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def recipes() -> str:
    """Every key of every recipe: type, default, what it is for."""
    from mixmask.pretrain.frameworks import FRAMEWORKS
    from mixmask.pretrain.mixtures import MIXTURES
    from mixmask.pretrain.recipe import PretrainRecipe
    from mixmask.transfer.detection.detectors import DETECTORS
    from mixmask.transfer.protocols import PROTOCOLS

    lines = [
        "# Recipes, key by key",
        "",
        "Keys can be set in a YAML file or on the command line (`key=value`, nested as `data.root=…`). Keys marked *no "
        "number* cannot change a result and are not in the fingerprint. Fractions are between 0 and 1, sizes in pixels, "
        "rates for the reference batch, unless said otherwise. Each [config](configs.md) names the source of its values in "
        "its first lines.",
        "",
        "## Pretraining",
        *_model(PretrainRecipe, "", skip=("framework", "mix")),
        "",
        "## Frameworks (`framework.kind`)",
    ]
    for kind, model in FRAMEWORKS.by_name().items():
        lines += ["", f"### {kind}", *_model(model, "framework.")]
    lines += ["", "## Mixtures (`mix.kind`)"]
    for kind, model in MIXTURES.by_name().items():
        lines += ["", f"### {kind}", *_model(model, "mix.")]
    lines += ["", "## Transfer (`protocol`)"]
    for kind, model in PROTOCOLS.by_name().items():
        lines += ["", f"### {kind}", *_model(model, "", skip=("detector",))]
    lines += ["", "## Detectors (`detector.kind`)"]
    for kind, model in DETECTORS.by_name().items():
        lines += ["", f"### {kind}", *_model(model, "detector.")]
    return "\n".join(lines) + "\n"


def _model(model: Any, prefix: str, skip: tuple[str, ...] = ()) -> Iterator[str]:
    about = inspect.cleandoc(model.__doc__ or "")
    yield from ("", *_references(about).splitlines(), "", "| key | type | default | |", "|---|---|---|---|")
    yield from _rows(model, prefix, skip)


def _references(text: str) -> str:
    """Sphinx's quotes as Markdown, and arXiv numbers as links."""
    text = text.replace("``", "`")
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", rf"[arXiv:\1]({SOURCES}\1)", text)


def _rows(model: type[BaseModel], prefix: str, skip: tuple[str, ...]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if name in skip:
            yield f"| `{prefix}{name}` | by its `kind` | | see below |"
            continue
        inner = _inner(field.annotation)
        if inner is not None:
            yield f"| `{prefix}{name}` | {'section, or null' if _optional(field.annotation) else 'section'} | | |"
            yield from _rows(inner, f"{prefix}{name}.", ())
            continue
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        said = field.description or _about_key(model.__doc__ or "", name)
        notes = [said, "*no number*" if extra.get("identity") is False else ""]
        limits = [_limit(one) for one in field.metadata]
        default = (
            "required" if field.default is PydanticUndefined and field.default_factory is None else _default(field)
        )
        kind = " ".join(filter(None, (_type(field.annotation), *limits)))
        about = _references(" ".join(filter(None, notes)))
        yield f"| `{prefix}{name}` | {_cell(kind)} | {_cell(default)} | {_cell(about)} |"


def _about_key(docstring: str, name: str) -> str:
    """The sentences of a recipe's docstring that name a key."""
    text = " ".join(docstring.split())
    sentences = re.split(r"(?<=[.:]) (?=[A-Z`])", text)
    return " ".join(one for one in sentences if re.search(rf"``{name}(?::[^`]*)?``", one))


def _inner(annotation: Any) -> type[BaseModel] | None:
    """The recipe that a key holds, if it is a single one."""
    options = [
        one for one in (get_args(annotation) if _is_union(annotation) else (annotation,)) if one is not type(None)
    ]
    one = options[0] if len(options) == 1 else None
    return one if isinstance(one, type) and issubclass(one, BaseModel) else None


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _optional(annotation: Any) -> bool:
    return _is_union(annotation) and type(None) in get_args(annotation)


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "null"
    if isinstance(value, BaseModel):
        kind = getattr(value, "kind", None)
        return f"`{{kind: {kind}}}`" if kind else ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"`{[getattr(one, 'kind', one) for one in value]}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _limit(one: Any) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return " ".join(
        f"{sign} {getattr(one, key):g}" for key, sign in signs.items() if getattr(one, key, None) is not None
    )


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type(get_args(annotation)[0])
    if _is_union(annotation):
        return " or ".join(dict.fromkeys(_type(one) for one in get_args(annotation)))
    if origin is Literal:
        return " or ".join(f"`{str(one).lower() if isinstance(one, bool) else one}`" for one in get_args(annotation))
    if annotation is type(None):
        return "null"
    if origin is not None:
        inner = ", ".join(dict.fromkeys(_type(one) for one in get_args(annotation) if one is not ...))
        return f"{'mapping' if origin is dict else 'list'} of {inner}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        kinds = annotation.model_fields.get("kind")
        return _type(kinds.annotation) if kinds is not None else annotation.__name__
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def configs() -> str:
    """Every shipped config with its first lines."""
    lines = ["# Configs", "", "Each is used by its name, from any folder. The text is the head of the file."]
    for kind in ("pretrain", "transfer", "suites", "cluster"):
        lines += ["", f"## {kind}"]
        for file in sorted((ROOT / "configs" / kind).glob("*.yaml")):
            head = []
            for line in file.read_text(encoding="utf-8").splitlines():
                if not line.startswith("#"):
                    break
                head.append(line.removeprefix("#").removeprefix(" "))
            lines += ["", f"### {file.stem}", "", "```text", *(head or ["(no comment)"]), "```"]
    return "\n".join(lines) + "\n"


def zoo() -> str:
    """The catalogue of known checkpoints."""
    from mixmask.transfer.zoo.catalogue import catalogue

    lines = [
        "# Known checkpoints",
        "",
        "`backbone=zoo:NAME` uses one; `mixmask zoo NAME` shows its address, digest and all published numbers. Addresses, "
        "licences and numbers are as the publishers' repositories state them. *by hand*: the place needs a browser.",
    ]
    by_publisher: dict[str, list[Any]] = {}
    for entry in catalogue().values():
        by_publisher.setdefault(entry.repository, []).append(entry)
    for repository, entries in sorted(by_publisher.items(), key=lambda item: item[0].lower()):
        lines += [
            "",
            f"## {repository.removeprefix('https://github.com/')}",
            "",
            f"<{repository}>, licence: {entries[0].licence}",
            "",
        ]
        lines += ["| name | method | network | epochs | digest | published numbers |", "|---|---|---|---:|---|---|"]
        for one in entries:
            digest = f"sha256 `{one.sha256[:8]}…`" if one.sha256 else f"md5 `{one.md5}…`" if one.md5 else "–"
            numbers = "; ".join(f"{number.what} {number.value:g}" for number in one.published[:6])
            name = f"`{one.name}`" + (" (by hand)" if one.by_hand else "")
            epochs = f"{one.epochs:g}" if one.epochs is not None else ""
            arch = one.arch.removeprefix("timm/")
            lines.append(f"| {name} | {_cell(one.title)} | {arch} | {epochs} | {digest} | {_cell(numbers)} |")
    return "\n".join(lines) + "\n"
