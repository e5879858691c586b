"""``record.json``: the result of a finished run, from which `evaluate` builds its tables."""

from __future__ import annotations

import json
import math
import platform
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from mixmask.engine import distributed
from mixmask.engine.errors import DataError, RunDirectoryError
from mixmask.engine.expected import Expectations
from mixmask.engine.provenance import code
from mixmask.engine.storage import RunDirectory, write_text
from mixmask.engine.texts import read_run_file

SCHEMA = 4
LARGEST = 1e100
MAX_RECORD = 1 << 26  # bytes
SCALARS = (str, int, float, bool, type(None))

Label = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Method = Label  # vanilla, mixmask, unmix, mixmask+unmix, mscn, random, unknown, or any name of the user's own
Fingerprint = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


def check_recipe_shape(recipe: dict[str, Any]) -> dict[str, Any]:
    """Check what other code relies on in a recipe read from a file: sections are mappings, ``mix`` holds plain values.

    Returns:
        The recipe, unchanged.

    Raises:
        ValueError: Naming the offending key.
    """
    try:
        # NaN and lone surrogates can be read from JSON, but could not be written to a valid file again.
        json.dumps(recipe, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"a recipe that cannot be written again ({str(error) or type(error).__name__})") from None
    for part in ("mix", "backbone", "framework", "optimizer", "data"):
        if recipe.get(part) is not None and not isinstance(recipe[part], dict):
            raise ValueError(f"{part} is {type(recipe[part]).__name__}, a mapping was expected")
    for key, value in (recipe.get("mix") or {}).items():
        if not isinstance(value, SCALARS) and not (
            isinstance(value, list) and all(isinstance(one, SCALARS) for one in value)
        ):
            raise ValueError(f"mix.{key} is {type(value).__name__}")
    ratio = (recipe.get("mix") or {}).get("ratio")
    if isinstance(ratio, list) and not all(isinstance(bound, int | float) for bound in ratio):
        raise ValueError(f"mix.ratio is {ratio!r}")
    return recipe


class Record(BaseModel):
    """The result of a finished run.

    ``metrics`` is a flat mapping; accuracies and average precisions are in percent (``knn/top1``, ``bbox/AP50``).
    ``lineage`` and ``protocol_fingerprint`` are the fingerprints of the pretraining and the transfer recipe without
    their seeds; runs that share both may be pooled in one table cell. ``recipe`` is the run's own recipe and
    ``pretraining`` the one that made its backbone, both reduced to the keys that can change a number
    (`engine.config.identity`). They are empty if unknown, as for a foreign checkpoint.

    A reader of records needs no list of protocols. ``title`` is the protocol's display name. ``headlines`` maps its
    main metrics, the most important first, to their column names. ``task`` is the task's name on model hubs. A result
    needs ``num_seeds`` runs with different seeds; ``variation`` says why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_version: int = Field(SCHEMA, alias="schema")
    stage: Literal["pretrain", "transfer"]
    protocol: str
    name: str
    dataset: str
    framework: str
    method: Method
    arch: str
    seed: int
    fingerprint: str
    parent: str | None = None
    pretrain_dataset: str | None = None
    pretrain_epochs: float | None = Field(None, ge=0, allow_inf_nan=False)
    pretrain_seed: int | None = None
    lineage: str = ""
    protocol_fingerprint: str = ""
    title: str = ""
    task: str = "image-classification"
    headlines: dict[str, str] = {}
    num_seeds: int = Field(1, ge=1)
    variation: str = ""
    settings: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    pretraining: dict[str, Any] = {}
    metrics: dict[str, float]
    expected: Expectations = ()
    data: dict[str, Any] = {}
    environment: dict[str, Any]
    seconds: float = Field(allow_inf_nan=False)

    @field_validator("metrics")
    @classmethod
    def _finite(cls, metrics: dict[str, float]) -> dict[str, float]:
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(f"metrics that are not finite numbers: {', '.join(bad)}")
        huge = [name for name, value in metrics.items() if abs(value) > LARGEST]
        if huge:
            raise ValueError(f"metrics beyond {LARGEST:g}: {', '.join(huge)}")
        return metrics

    _shaped = field_validator("recipe", "pretraining")(check_recipe_shape)

    @property
    def headline(self) -> tuple[str, float] | None:
        """The first headline metric that this run has, with its value; None if it has none."""
        return next(((metric, self.metrics[metric]) for metric in self.headlines if metric in self.metrics), None)

    def metric_name(self, metric: str) -> str:
        """A metric in words, without the protocol's title: ``top-1``, ``box AP50``."""
        plain = metric.split("/")[-1].replace("top", "top-")
        return self.headlines.get(metric, plain).removeprefix(f"{self.title} ")

    def text(self) -> str:
        """The record as indented JSON with a final newline, as it is written to disk."""
        return self.model_dump_json(indent=2, by_alias=True) + "\n"

    def write(self, path: Path) -> None:
        """Write the record atomically (see `write_atomic`)."""
        write_text(path, self.text())

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read a record; one of an older schema is migrated.

        Raises:
            ValueError: If the file is truncated, is not a record, or is of a newer schema.
        """
        try:
            content = read_run_file(path, MAX_RECORD)
        except DataError as error:
            raise ValueError(error.one_line()) from None
        try:
            document = json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(f"truncated or not JSON: {error}") from None
        except RecursionError:
            raise ValueError("not a record: nested too deeply") from None
        # JSON can hold half a surrogate pair, which UTF-8 cannot encode. Refuse it here, not at the next write.
        if b"\\ud" in content.lower():
            json.dumps(document, ensure_ascii=False).encode()
        if not isinstance(document, dict):
            raise ValueError(f"not a record: a JSON {type(document).__name__}")
        try:
            return cls.model_validate(migrated(document))
        except ValidationError as error:
            raise ValueError(_first_problem(error)) from None


def migrated(document: dict[str, Any]) -> dict[str, Any]:
    """Migrate a record's JSON document to the current schema.

    Schema 1 had no recipes, and one expectation or none. Schemas 1 and 2 did not store the protocol's title and
    headlines. Schema 3 kept the options of the detector (C4 was the only one) beside those of its training.

    Raises:
        ValueError: If the schema is missing or unknown.
    """
    version = document.get("schema")
    if version == 1:
        document = {**document, "expected": document.get("expected") or []}
    if version in (1, 2):
        document = {**document, **said_before_schema_3(str(document.get("protocol")))}
    if version in (1, 2, 3):
        return {**document, "recipe": _with_detector(document.get("recipe")), "schema": SCHEMA}
    if version != SCHEMA:
        known = f"this version reads 1 to {SCHEMA}"
        raise ValueError("not a record: no schema" if version is None else f"of schema {version!r}; {known}")
    return document


def _with_detector(recipe: Any) -> Any:
    if not isinstance(recipe, dict) or not {"rpn", "roi"} <= recipe.keys():
        return recipe if recipe is not None else {}
    rest = {key: value for key, value in recipe.items() if key not in ("rpn", "roi")}
    return {**rest, "detector": {"kind": "c4", "rpn": recipe["rpn"], "roi": recipe["roi"]}}


def said_before_schema_3(protocol: str) -> dict[str, Any]:
    """Title, headlines and task of a protocol, which records of schema 1 and 2 did not store.

    Raises:
        ValueError: If a name that begins with ``semisup_`` does not end in a percentage.
    """
    family, _, share = protocol.partition("_")
    if family == "semisup":
        if not re.fullmatch(r"\d+(\.\d+)?", share):
            raise ValueError(f"protocol: {protocol}: semisup_ and a percentage was expected")
        title = f"{share} % of labels"
        return {"title": title, "headlines": {"semisup/top1": f"{title} top-1"}}
    if family == "detect":
        boxes, masks = (
            {f"{kind}/{ap}": f"{word} {ap}" for ap in ("AP", "AP50", "AP75")}
            for kind, word in (("bbox", "box"), ("segm", "mask"))
        )
        said: dict[str, Any] = {"title": "detection", "task": "object-detection", "headlines": {**boxes, **masks}}
        if protocol == "detect_voc":
            said |= {
                "headlines": boxes,
                "num_seeds": 5,
                "variation": "on VOC runs differ by about 0.2 AP, 0.2 AP50, 0.4 AP75",
            }
        return said
    titles = {"knn": "kNN", "linear": "linear"}
    if protocol in titles:
        return {"title": titles[protocol], "headlines": {f"{protocol}/top1": f"{titles[protocol]} top-1"}}
    if protocol == "pretrain":
        return {"title": "pretraining", "headlines": {"knn/top1": "kNN top-1", "loss": "loss"}}
    return {"title": protocol, "headlines": {}}


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
    return f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}{more}"


def finished_record(directory: RunDirectory) -> Record:
    """Read the record of a finished run.

    Raises:
        RunDirectoryError: If the file is damaged.
    """
    try:
        return Record.read(directory.record_file)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise RunDirectoryError(f"{directory.record_file}: damaged ({reason}); delete it to run again") from None


def environment() -> dict[str, Any]:
    """Python and torch versions, device, CPU threads, code commit, world size and backend of this run."""
    return {**_machine(), **distributed.environment()}


@cache
def _machine() -> dict[str, Any]:
    import torch
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu_threads": torch.get_num_threads(),
        "git_commit": code().commit,
    }
