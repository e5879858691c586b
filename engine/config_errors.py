"""Turns pydantic's errors into messages for config authors: the file, the key, what was given, what would be valid."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from mixmask.engine.wording import did_you_mean

# What pydantic puts into a location for a key that takes one of several forms.
FORM = re.compile(r"constrained-\w+|float|int|bool|str|(tuple|list|literal|function-\w+)\[.*\]")


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, tuple, list, dict) or hasattr(annotation, "__metadata__"):
        return [m for arg in get_args(annotation) for m in _models_in(arg)]
    return []


def _paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a recipe, sections included (``mix``, ``mix.grid``)."""
    found = []
    for name, field in model.model_fields.items():
        found.append(f"{prefix}{name}")
        for inner in _models_in(field.annotation):
            found += _paths(inner, f"{prefix}{name}.")
    return [*dict.fromkeys(found)]


def _kinds_with(model: type[BaseModel], keys: Sequence[str]) -> list[str]:
    """The kinds of a section that have a certain key (``mix.grid``: mixmask, mixmask+unmix)."""
    if len(keys) != 2 or keys[0] not in model.model_fields:
        return []
    models = _models_in(model.model_fields[keys[0]].annotation)
    return [kind for inner in models if keys[1] in inner.model_fields for kind in _kinds_of(inner)]


def _model_at(model: type[BaseModel], location: Sequence[Any]) -> tuple[type[BaseModel], list[str]]:
    """The recipe class that ``location`` leads into, and the location without pydantic's union tags."""
    keys: list[str] = []
    candidates = [model]
    for part in location:
        name = str(part)
        field = next((m.model_fields[name] for m in candidates if name in m.model_fields), None)
        if field is not None:
            keys.append(name)
            inner = _models_in(field.annotation)
            if inner:
                candidates = inner
            continue
        tagged = [m for m in candidates if name in _kinds_of(m) or m.__name__ == name]
        if tagged:
            candidates = tagged
        elif not FORM.fullmatch(name):
            keys.append(name)
    return candidates[0], keys


def _kinds_of(model: type[BaseModel]) -> tuple[str, ...]:
    for name in ("kind", "protocol"):
        field = model.model_fields.get(name)
        if field is not None:
            return tuple(map(str, get_args(field.annotation)))
    return ()


def explained(
    problems: Iterable[Any], model: type[BaseModel], sources: Mapping[str, str], path: str, origin: str
) -> list[str]:
    """One line for each problem that pydantic found; the arguments are those of `explain`.

    A key that takes a value or a list (``lr: 1`` or ``lr: [1, 2]``) fails in both forms. Only what is wrong with the form
    that was given is said.
    """
    return [explain(one, model, sources, path, origin) for one in problems if not _is_of_the_other_form(one)]


def _is_of_the_other_form(problem: Any) -> bool:
    """Whether it is about the form of a value or a list in which the user did not write it."""
    forms = [place for place, part in enumerate(problem["loc"]) if FORM.fullmatch(str(part))]
    if not forms:
        return False
    whole = forms[-1] == len(problem["loc"]) - 1  # about the value itself, not about an item of the list
    given, form = problem.get("input"), str(problem["loc"][forms[-1]])
    if form.startswith(("literal", "function")):  # a name, or a mapping (``normalization``)
        return whole and isinstance(given, Mapping) != form.startswith("function")
    return whole and isinstance(given, list | tuple) != form.startswith(("tuple", "list"))


def explain(problem: Any, model: type[BaseModel], sources: Mapping[str, str], path: str, origin: str) -> str:
    """One line about a problem that pydantic found.

    Args:
        problem: As `pydantic.ValidationError.errors` gives it.
        model: The recipe's class.
        sources: For every dotted key, where it was set last.
        path: The config file.
        origin: What messages call the source of the overrides.
    """
    location, kind = problem["loc"], problem["type"]
    given = problem.get("input")
    owner, keys = _model_at(model, location[:-1] if kind in ("extra_forbidden", "missing") else location)
    if kind in ("extra_forbidden", "missing"):
        keys = [*keys, str(location[-1])]
    dotted = ".".join(keys)
    source = path
    for depth in range(len(keys), 0, -1):
        if ".".join(keys[:depth]) in sources:
            source = sources[".".join(keys[:depth])]
            break
    # A section that is wrong is wrong where its keys were set last.
    if any(sources[key] == origin for key in sources if key.startswith(f"{dotted}.")):
        source = origin
    where = f"{source}: {dotted}" if dotted else source
    if kind == "extra_forbidden":
        valid = list(owner.model_fields)
        deeper = [path for path in _paths(model) if path.split(".")[-1] == location[-1]]  # same key elsewhere
        kinds = _kinds_with(model, keys)
        if kinds:
            hint = f"Another kind has this key: {'.'.join(keys[:-1])}.kind={' or '.join(kinds)}."
        elif 0 < len(deeper) <= 2:
            hint = f"Did you mean {' or '.join(map(repr, deeper))}?"
        else:
            hint = did_you_mean(location[-1], valid)
        text = f"{source}: unknown key '{dotted}' (given: {given!r}). {hint}".rstrip()
        return f"{text} Valid keys here: {', '.join(valid)}"
    if kind == "missing":
        # Items of a list have no key of their own on the command line.
        inside = any(part.isdigit() for part in keys)
        how = "" if inside else f": give {dotted}=… on the command line or in the file"
        return f"{path}: the key '{dotted}' is required and missing{how}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = str(problem["ctx"]["discriminator"]).strip("'")
        value = given.get(tag) if isinstance(given, Mapping) else given
        expected = problem["ctx"].get("expected_tags", "one of the kinds")
        hint = did_you_mean(value, re.findall(r"'([^']+)'", expected))
        where = sources.get(f"{dotted}.{tag}", source)
        return f"{where}: {dotted}.{tag}: given {value!r}; valid: {expected}. {hint}".rstrip()
    if kind == "model_type":
        return f"{where}: a mapping with the keys {', '.join(owner.model_fields)} was expected (given: {given!r})"
    message = _in_our_words(problem["msg"])
    if kind == "value_error" and isinstance(given, Mapping):
        with_overrides = f"{path} and {_the(origin)}" if origin in sources.values() else path
        return f"{where}: {message}" if dotted else f"{with_overrides}: {message}"
    return f"{where}: {message} (given: {given!r})"


def _in_our_words(message: str) -> str:
    """A pydantic message in the terms of a config file: a list and not a tuple, a mapping and not a dictionary."""
    message = (
        message.removeprefix("Value error, ").replace("valid tuple", "valid list").replace("dictionary", "mapping")
    )
    for pattern, ours in (
        (r"Input should be a valid integer(, .*)?", "a whole number was expected"),
        (r"Input should be a valid boolean(, .*)?", "true or false was expected"),
        (r"Input should be a valid string(, .*)?", "a text was expected"),
        (r"Input should be a valid ([a-z]+)(, .*)?", r"a \1 was expected"),
        (r"Input should be an? ([a-z ]+)", r"a \1 was expected"),
        (r"Input should be (.*)", r"must be \1"),
        (r"(?:Tuple|List) should have at least ([0-9]+) items?.*", r"needs at least \1 value(s)"),
        (r"(?:Tuple|List) should have at most ([0-9]+) items?.*", r"takes at most \1 value(s)"),
        (r"String should (.*)", r"the text must \1"),
        (r"Value should (.*)", r"must \1"),
    ):
        message = re.sub(f"^{pattern}$", ours, message)
    return message


def _the(origin: str) -> str:
    return origin if origin.startswith("the ") else f"the {origin}"
