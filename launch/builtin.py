"""Where the configs that come with the project lie: beside the packages in a checkout, inside `launch` when installed."""

from __future__ import annotations

from pathlib import Path

from engine.errors import ConfigError


def configs_folder() -> Path:
    """The folder ``configs``.

    Raises:
        ConfigError: If the installation is incomplete.
    """
    here = Path(__file__).resolve().parent
    for folder in (here.parent / "configs", here / "configs"):
        if (folder / "pretrain").is_dir():
            return folder
    raise ConfigError(f"no configs beside {here} or in it: reinstall the project")
