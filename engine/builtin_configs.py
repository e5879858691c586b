"""Where the configs that come with the project lie: at the root of a checkout, inside the package when installed."""

from __future__ import annotations

import re
from pathlib import Path

from mixmask.engine.errors import ConfigError
from mixmask.engine.wording import did_you_mean

KINDS = ("pretrain", "transfer", "suites", "cluster")


def configs_folder() -> Path:
    """The folder ``configs``.

    Raises:
        ConfigError: If the installation is incomplete.
    """
    folder = Path(__file__).resolve().parents[1] / "configs"
    if not (folder / "pretrain").is_dir():
        raise ConfigError(f"{folder}: no such folder: reinstall the project")
    return folder


def config_file(given: Path, kind: str | None = None) -> Path:
    """The config that a user means: a file, or the name of one that comes with the project, from any folder.

    Args:
        given: A path, or a name such as ``knn`` or ``cifar100_moco``; ``configs/…`` means the project's where there is no
            such folder.
        kind: Where names are looked for: ``pretrain``, ``transfer``, ``suites`` or ``cluster``; by default everywhere.

    Raises:
        ConfigError: If it is neither; with the nearest names.
    """
    if given.is_file() or given.is_absolute():
        return given
    folder = configs_folder()
    if given.parts and given.parts[0] == "configs" and folder.joinpath(*given.parts[1:]).is_file():
        return folder.joinpath(*given.parts[1:])
    return given if len(given.parts) > 1 else named_config(str(given), kind)  # a path's reader says what is there


def named_config(given: str, kind: str | None = None) -> Path:
    """A config that comes with the project, by its name.

    Raises:
        ConfigError: If there is none; with the nearest names.
    """
    folder = configs_folder()
    name = given.removesuffix(".yaml")
    files = {path.stem: path for one in ((kind,) if kind else KINDS) for path in sorted((folder / one).glob("*.yaml"))}
    if name in files:
        return files[name]
    other = next((one for one in KINDS if (folder / one / f"{name}.yaml").is_file()), None)
    if other is not None:
        raise ConfigError(f"{given}: is a config for {other}, not for {kind}; see `mixmask configs {kind}`")
    hint = did_you_mean(name, files, most=3)
    text = f"{given}: no such config file, and no config of that name; `mixmask configs` lists them. {hint}"
    raise ConfigError(text.rstrip())


def listed_configs(kind: str | None = None) -> list[tuple[str, str, str]]:
    """Kind, name and first sentence of every config that comes with the project."""
    folder = configs_folder()
    found = []
    for place in KINDS if kind is None else (kind,):
        for path in sorted((folder / place).glob("*.yaml")):
            found.append((place, path.stem, _first_sentence(path.read_text(encoding="utf-8"))))
    return found


def _first_sentence(text: str) -> str:
    """What a config's head begins with, up to its first full stop, its command or an empty line."""
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("# ") or line.startswith("#   "):
            break
        lines.append(line.removeprefix("# ").strip())
        if line.rstrip().endswith("."):
            break
    return re.split(r"(?<=\.) ", " ".join(lines))[0]
