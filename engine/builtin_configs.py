"""Finds the configs that ship with the project: at the root of a checkout, or inside the installed package."""

from __future__ import annotations

import re
from pathlib import Path

from mixmask.engine.errors import ConfigError
from mixmask.engine.wording import did_you_mean

KINDS = ("pretrain", "transfer", "suites", "cluster")


def configs_folder() -> Path:
    """The folder of the shipped configs.

    Raises:
        ConfigError: If the installation is incomplete.
    """
    folder = Path(__file__).resolve().parents[1] / "configs"
    if not (folder / "pretrain").is_dir():
        raise ConfigError(f"{folder}: no such folder: reinstall the project")
    return folder


def config_file(given: Path, kind: str | None = None) -> Path:
    """The config file that a user means: a path, or the name of a shipped config, which works from any folder.

    Args:
        given: A path, or a name such as ``knn`` or ``cifar100_moco``. If ``configs/…`` does not exist here, the shipped
            config of that path is used.
        kind: Where names are looked up: ``pretrain``, ``transfer``, ``suites`` or ``cluster``; by default everywhere.

    Returns:
        The file. A path with folders in it is returned even if it does not exist.

    Raises:
        ConfigError: If there is no config of that name; suggests the nearest ones.
    """
    if given.is_file() or given.is_absolute():
        return given
    folder = configs_folder()
    if given.parts and given.parts[0] == "configs" and folder.joinpath(*given.parts[1:]).is_file():
        return folder.joinpath(*given.parts[1:])
    # A path that does not exist is reported by whoever reads it, together with the configs in that folder.
    return given if len(given.parts) > 1 else named_config(str(given), kind)


def named_config(given: str, kind: str | None = None) -> Path:
    """A shipped config by its name, with or without ``.yaml``.

    Raises:
        ConfigError: If there is none; suggests the nearest names.
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
    """Kind, name and first sentence of every shipped config, or of those of one kind."""
    folder = configs_folder()
    found = []
    for place in KINDS if kind is None else (kind,):
        for path in sorted((folder / place).glob("*.yaml")):
            found.append((place, path.stem, _first_sentence(path.read_text(encoding="utf-8"))))
    return found


def _first_sentence(text: str) -> str:
    """The first sentence of a config's header comment; it also ends before an indented command or an empty line."""
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("# ") or line.startswith("#   "):
            break
        lines.append(line.removeprefix("# ").strip())
        if line.rstrip().endswith("."):
            break
    return re.split(r"(?<=\.) ", " ".join(lines))[0]
