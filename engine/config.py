"""From YAML and ``key=value`` overrides to a frozen, typed recipe; and the fingerprint of a recipe.

A config file may name a ``base:``, which is a file relative to itself or the name of a config of the project. It extends
the mappings of its base key by key. A mapping with a ``kind`` key describes one of several things: when an extension
changes the kind, it replaces the whole mapping, because the old kind's keys mean nothing to the new one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mixmask.engine.builtin_configs import named_config
from mixmask.engine.config_errors import explained
from mixmask.engine.errors import ConfigError, DataError
from mixmask.engine.texts import read_text

R = TypeVar("R", bound="Recipe")

# Expected scores hold for their own file only. A config that extends it, or overrides that change numbers, drop them.
EXPECTED = "expected"


# Top-level keys that show that a file is another kind of config than the one expected.
OTHER_FILES = {
    "grids": "a suite: `mixmask launch` runs it",
    "framework": "a pretraining recipe: `mixmask pretrain` runs it",
    "protocol": "a transfer recipe: `mixmask transfer` runs it",
    "partition": "a cluster's profile, for `mixmask launch --profile`",
}


class Recipe(BaseModel):
    """Base of every typed recipe: frozen, and an unknown key is an error.

    ``moved`` maps keys of an earlier version to their new dotted names, so that old configs can still be read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)

    moved: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _read_moved(cls, tree: Any) -> Any:
        return _at_new_places(tree, cls.moved) if cls.moved and isinstance(tree, Mapping) else tree

    def first_form(self, identity: dict[str, Any]) -> dict[str, Any]:
        """The identity in the layout of the first release; fingerprints use it, so renamed keys do not change them."""
        return identity


def operational(default: Any, **kwargs: Any) -> Any:
    """A field that cannot change a run's numbers, and is therefore left out of the fingerprint.

    Examples are the folder of the data, the number of workers and how often to log.
    """
    return Field(default, json_schema_extra={"identity": False}, **kwargs)


def added(default: Any, **kwargs: Any) -> Any:
    """A field that was added after the first release.

    At its default value it is left out of the identity, so that runs from before the field existed keep their
    fingerprint.
    """
    return Field(default, json_schema_extra={"identity": "unless default"}, **kwargs)


MAX_CONFIG, MAX_VALUES = 10_000_000, 100_000  # bytes of a config file, values in it

# --- reading ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """A SafeLoader that reads YAML 1.2 numbers (PyYAML reads ``1e-4`` as a string) and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"),
    list("-+0123456789."),
)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        _require_small(text, source)
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ConfigError(f"{source}: not valid YAML: nested too deeply") from None
    except (ValueError, TypeError) as error:  # PyYAML's own, for an impossible date or a mapping as a key
        lines = str(error).splitlines() or [type(error).__name__]
        raise ConfigError(f"{source}: not valid YAML: {lines[0]}", *lines[1:]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{source}{place}: not valid YAML: {getattr(error, 'problem', error)}") from None


def _require_small(text: str, source: str) -> None:
    """Refuse YAML whose aliases expand to more than ``MAX_VALUES`` values, or to themselves."""
    if "*" not in text or "&" not in text:
        return
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            # Provisional: an alias inside the node that it refers to finds this value, and so counts as too large.
            sizes[id(node)] = MAX_VALUES + 1
            inner = node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else []
            flat = (one for part in inner for one in (part if isinstance(part, tuple) else (part,)))
            sizes[id(node)] = min(1 + sum(map(size, flat)), MAX_VALUES + 1)
        return sizes[id(node)]

    # compose() only builds the graph of nodes, where aliases share a node: even a "billion laughs" file is small there.
    node = yaml.compose(text, Loader=_Loader)
    if node is not None and size(node) > MAX_VALUES:
        raise ConfigError(
            f"{source}: its aliases (&name, *name) expand to more than {MAX_VALUES:,} values, or to themselves"
        )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        yield name
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{name}.")


def _merge(base: Mapping[str, Any], extension: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` extended by ``extension``; a mapping whose ``kind`` changes is replaced."""
    merged = dict(base)
    for key, value in extension.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            other_kind = "kind" in value and value["kind"] != old.get("kind")
            merged[key] = dict(value) if other_kind else _merge(old, value)
        else:
            merged[key] = value
    return merged


def _at_new_places(tree: Mapping[str, Any], moved: Mapping[str, str]) -> dict[str, Any]:
    """The mapping with its ``moved`` keys under their new names; an old key wins over its new name."""
    result = {key: value for key, value in tree.items() if key not in moved}
    for old, new in moved.items():
        if old in tree:
            extension: Any = tree[old]
            for part in reversed(new.split(".")):
                extension = {part: extension}
            result = _merge(result, extension)
    return result


def _new_name(key: str, moved: Mapping[str, str]) -> str:
    """Rename the first part of a dotted key, or of a ``key=value`` override, if it was moved."""
    first = re.split(r"[.=]", key, maxsplit=1)[0]
    return moved.get(first, first) + key[len(first) :]


def read_config(path: Path, _chain: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a config file and its bases.

    Returns:
        The merged mapping, and for every dotted key the file that set it last.

    Raises:
        ConfigError: If a file is missing, is not YAML, is not a mapping, or the bases form a cycle.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f" Configs in that folder: {', '.join(near)}." if near else ""
        raise ConfigError(f"{path}: no such config file.{hint}")
    resolved = path.resolve()
    if resolved in _chain:
        raise ConfigError(f"{path}: its 'base:' leads back to itself")
    try:
        text = read_text(path, MAX_CONFIG)
    except DataError as error:
        raise ConfigError(*error.args) from None
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, this file holds {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree, {key: str(path) for key in _leaves(tree)}
    if not isinstance(base, str):
        raise ConfigError(f"{path}: 'base' names one file, got {base!r}")
    beside = path.parent / base
    try:
        found = beside if len(Path(base).parts) > 1 or beside.is_file() else named_config(base)
    except ConfigError as error:
        raise ConfigError(f"{path}: base: {error.one_line()}") from None
    if not found.is_file():
        raise ConfigError(f"{path}: base: {beside}: no such file")
    merged, sources = read_config(found, (*_chain, resolved))
    # The base's expected scores were measured without this file's changes.
    merged.pop(EXPECTED, None)
    sources.update({key: str(path) for key in _leaves(tree)})
    return _merge(merged, tree), sources


def _apply_override(tree: dict[str, Any], override: str) -> tuple[dict[str, Any], str]:
    key, equals, text = override.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise ConfigError(f"override {override!r}: expected key=value, for example epochs=10 or mix.grid=4")
    # ``key=`` sets the key to null.
    value = _parse_yaml(text, f"override {override!r}") if text else None
    extension: Any = value
    for part in reversed(key.split(".")):
        extension = {part: extension}
    return _merge(tree, extension), key


def load_recipe(model: type[R], path: Path | str, overrides: Sequence[str] = (), origin: str = "command line") -> R:
    """Read a config and validate it into a recipe.

    Args:
        model: The recipe's class.
        path: A YAML file.
        overrides: ``key=value`` strings; keys are dotted, values are YAML.
        origin: What messages call the source of the overrides.

    Raises:
        ConfigError: With one line per problem: the file, the key, what was given and what would be valid.
    """
    written, sources = read_config(Path(path))
    written = _at_new_places(written, model.moved)
    sources = {_new_name(key, model.moved): source for key, source in sources.items()}
    for key, what in OTHER_FILES.items():
        if key in written and key not in model.model_fields:
            raise ConfigError(f"{path}: is {what}")
    tree = written
    for override in overrides:
        tree, key = _apply_override(tree, _new_name(override, model.moved))
        sources[key] = origin
        for leaf in list(sources):
            if leaf.startswith(f"{key}."):
                sources[leaf] = origin
    try:
        recipe = model.model_validate(tree)
    except ValidationError as error:
        found = error.errors(include_url=False)
        inner = {problem["loc"][:depth] for problem in found for depth in range(len(problem["loc"]))}
        # pydantic also reports a list with invalid entries as too short. Only the entries are the user's mistake.
        own = [problem for problem in found if problem["loc"] not in inner or problem["type"] != "too_short"]
        raise ConfigError(*dict.fromkeys(explained(own, model, sources, str(path), origin))) from None
    if tree.get(EXPECTED) and sources.get(EXPECTED) != origin and _changed(recipe, written, tree):
        return model.model_validate({**tree, EXPECTED: []})
    return recipe


def recipe_of_text(model: type[R], text: str, name: str) -> R:
    """Validate YAML text into a recipe, without ``base:`` and overrides.

    Raises:
        ConfigError: With ``name``, the key, what was given and what would be valid.
    """
    tree = _parse_yaml(text, name)
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: a mapping of keys to values was expected, this file holds {type(tree).__name__}")
    return checked_recipe(model, tree, name)


def checked_recipe(model: type[R], tree: Mapping[str, Any], name: str) -> R:
    """Validate a mapping of keys into a recipe.

    Raises:
        ConfigError: With ``name``, the key, what was given and what would be valid.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(*explained(error.errors(include_url=False), model, {}, name, name)) from None


def _changed(recipe: Recipe, written: Mapping[str, Any], tree: Mapping[str, Any]) -> bool:
    """Whether overrides changed anything in the recipe's identity other than its seed."""
    # Required keys that the file leaves open (a backbone, data.root) must be given, and so are not a change.
    open_keys = {
        name: tree[name]
        for name, field in type(recipe).model_fields.items()
        if field.is_required() and name in tree and name not in written
    }
    try:
        before = type(recipe).model_validate({**written, **open_keys})
    except ValidationError:
        return True
    return {**identity(before), "seed": None} != {**identity(recipe), "seed": None}


def read_key(path: Path | str, overrides: Sequence[str], key: str) -> Any:
    """The value of a top-level key, read before the config is validated; None if the key is absent.

    Raises:
        ConfigError: If the file cannot be read.
    """
    tree, _ = read_config(Path(path))
    for override in overrides:
        tree, _ = _apply_override(tree, override)
    return tree.get(key)


# --- identity --------------------------------------------------------------------------------------------------------


def identity(recipe: BaseModel) -> dict[str, Any]:
    """The keys of a recipe that can change its numbers, as plain JSON values.

    `operational` fields are left out, and so are `added` fields at their default.
    """
    result: dict[str, Any] = {}
    plain = recipe.model_dump(mode="json")
    for name, field in type(recipe).model_fields.items():
        extra = field.json_schema_extra
        place = extra.get("identity") if isinstance(extra, dict) else None
        value = getattr(recipe, name)
        if place is False or (place == "unless default" and value == field.default):
            continue
        result[name] = identity(value) if isinstance(value, BaseModel) else plain[name]
    return result


def fingerprinted(recipe: Recipe) -> dict[str, Any]:
    """The mapping that a recipe's fingerprint is computed from."""
    return recipe.first_form(identity(recipe))


def fingerprint_of(what: Mapping[str, Any], parent: str | None = None) -> str:
    """Fingerprint of ``what`` (JSON values) and of its parent run: the first twelve hexadecimal digits of a SHA-256."""
    # Sorted keys: the order of keys in a file must not change the fingerprint.
    text = json.dumps({"parent": parent, "recipe": what}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Readable differences between two identities, such as ``mix.grid: 2 -> 4``."""
    lines: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differing_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines


def to_yaml(recipe: BaseModel) -> str:
    """The resolved recipe as YAML that `load_recipe` accepts again."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
