"""The tables of the paper, the methods × protocols overview, and free pivots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mixmask.engine.errors import UserError
from mixmask.engine.records import said_before_schema_3
from mixmask.evaluate.collect import ABLATED
from mixmask.evaluate.names import METHODS, METRICS, NAMES, epochs_name, name, setting_name
from mixmask.evaluate.published import Published, of_the_paper
from mixmask.evaluate.reference import stated
from mixmask.evaluate.results import DETECTION, Result
from mixmask.evaluate.tables import Key, Layout, Place

TABLE_1 = ("grid_size", "mask", "mask_ratio", "switch")
DISCRETE = (
    "CIFAR-100's default mask is discrete, as the table marks it (68.1, blocked 67.8), "
    "although section 4.1 says blocked."
)
HEAD = (
    "kNN on CIFAR-100 and Tiny-ImageNet is taken on the output of the 128-d projection head, "
    "as MoCo's CIFAR demo and Un-Mix's code have it (inferred)."
)
ABLATIONS = "Runs that vary the mask, the permutation or Un-Mix's probability stand in tables 1 to 3."

ORDER = {NAMES.get(method, method): number for number, method in enumerate(METHODS)}

Dims = Mapping[str, Any]
Label = Callable[[Dims], Key]


def _of(number: Published) -> dict[str, Any]:
    """The dimensions of a published number, as `Result.dims` has them."""
    dims = {
        "protocol": number.protocol,
        "dataset": number.dataset,
        "framework": number.framework,
        "method": number.method,
        "metric": number.metric,
        "title": said_before_schema_3(number.protocol)["title"],
        "pretrain_epochs": number.pretrain_epochs,
        "pretrain_dataset": "imagenet1k" if number.protocol.startswith("detect_") else number.dataset,
    }
    return {**dims, **({number.setting[0]: number.setting[1]} if number.setting else {})}


def _claims(dims: Dims, epochs: float | None) -> dict[str, Any]:
    """What is stated of a place."""
    claims = stated(dims)
    if epochs is not None and claims:
        claims["pretrain.epochs"] = epochs
    return claims


def _layout(
    id: str,
    title: str,
    row_names: Key,
    belongs: Callable[[Dims], bool],
    row: Label,
    column: Label,
    published: Sequence[Published],
    said: Sequence[str] = (),
    notes: tuple[str, ...] = (),
) -> Layout:
    """A table whose rows and columns follow from a result's dimensions, of the data sets of which numbers are published."""
    placed = []
    for number in published:
        dims = _of(number)
        if number.table == id and belongs(dims):
            placed.append(((row(dims), column(dims)), number))
    placed = _in_place(placed)
    epochs = {place: number.pretrain_epochs for place, number in placed}
    usual = {number.dataset: number.pretrain_epochs for _, number in placed}

    def places(result: Result) -> Iterable[Place]:
        if belongs(result.dims) and (not usual or result.dims["dataset"] in usual):
            yield row(result.dims), column(result.dims)

    def claims(result: Result, place: Place) -> Mapping[str, Any]:
        expected = epochs.get(place, usual.get(result.dims["dataset"]))
        return _claims(result.dims, expected)

    return Layout(id, title, row_names, places, placed, claims, said=lambda place: said, order=ORDER, notes=notes)


def _usual(dims: Dims) -> bool:
    """Whether it is no ablation: what tables 1 to 3 vary is as the paper has it elsewhere."""
    usual = stated(dims)
    return all(dims.get(key) in (None, usual[key]) for key in ABLATED if key in usual)


def _classified(dims: Dims) -> bool:
    return dims["protocol"] in ("knn", "linear") and dims["pretrain_dataset"] in (None, dims["dataset"])


def _table_4(dims: Dims) -> bool:
    probed = _classified(dims) and dims["protocol"] == "linear"
    return probed and _usual(dims) and dims["method"] in ("vanilla", "mscn", "mixmask")


def _measured(dims: Dims) -> Key:
    return name(dims["dataset"]), name(dims["framework"]), dims["title"]


def _detected(dims: Dims) -> bool:
    return dims["protocol"] in ("detect_voc", "detect_coco") and dims["metric"] in DETECTION


def _detection(dims: Dims) -> Key:
    return name(dims["dataset"]), METRICS[dims["metric"]]


def _method_row(dims: Dims) -> Key:
    return name(dims["framework"]), name(dims["method"])


def table_1(published: Sequence[Published]) -> Layout:
    """Masks: one key of the default varied at a time; the default stands in every section."""

    def row(key: str, dims: Dims) -> Key:
        return name(key), setting_name(key, dims[key])

    placed = _in_place(
        ((row(number.setting[0], _of(number)), _measured(_of(number))), number)
        for number in published
        if number.table == "1" and number.setting is not None
    )
    epochs = {number.dataset: number.pretrain_epochs for _, number in placed}

    def places(result: Result) -> Iterable[Place]:
        dims = result.dims
        if not _classified(dims) or dims["method"] != "mixmask" or dims["dataset"] not in epochs:
            return
        usual = stated(dims)
        unusual = [key for key in TABLE_1 if key in usual and dims[key] != usual[key]]
        for key in TABLE_1:
            if dims[key] is not None and set(unusual) <= {key}:
                yield row(key, dims), _measured(dims)

    def claims(result: Result, place: Place) -> Mapping[str, Any]:
        return _claims(result.dims, epochs.get(result.dims["dataset"]))

    def said(place: Place) -> Sequence[str]:
        return [key for key in TABLE_1 if name(key) == place[0][0]]

    title = "Masks of MixMask: grid size, strategy, ratio, switch image"
    return Layout(
        "1", title, ("varied", "value"), places, placed, claims, said=said, sections=True, notes=(DISCRETE, HEAD)
    )


def _varied(id: str, title: str, key: str, published: Sequence[Published], notes: tuple[str, ...] = ()) -> Layout:
    def belongs(dims: Dims) -> bool:
        return _classified(dims) and dims["method"] == "mixmask+unmix" and dims.get(key) is not None

    return _layout(
        id,
        title,
        (name(key).lower(),),
        belongs,
        lambda dims: (setting_name(key, _number(dims[key])),),
        _measured,
        published,
        said=(key,),
        notes=notes,
    )


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def layouts(published: Sequence[Published] = ()) -> dict[str, Layout]:
    """The tables of the paper, by their numbers.

    Args:
        published: Numbers besides the paper's.
    """
    numbers = (*of_the_paper(), *published)
    inferred = ("The order of the three published values is inferred: the paper's text finds 0.5 best.",)
    unpublished = ("No numbers of the paper are carried for this table.",)
    tables = [
        table_1(numbers),
        _varied("2", "Permutations in Un-Mix and MixMask", "permutation", numbers, (HEAD,)),
        _varied("3", "Share of Mixup in Un-Mix beside MixMask", "unmix_prob", numbers, inferred),
        _layout(
            "4",
            "Linear probing against MSCN",
            ("framework", "method"),
            _table_4,
            _method_row,
            lambda dims: (name(dims["dataset"]), f"{epochs_name(dims['pretrain_epochs'])} epochs"),
            numbers,
            said=("pretrain.epochs",),
            notes=(ABLATIONS,),
        ),
        _layout(
            "5",
            "Methods on every framework and data set",
            ("method",),
            lambda dims: _classified(dims) and _usual(dims),
            lambda dims: (name(dims["method"]),),
            _measured,
            numbers,
            notes=(ABLATIONS, HEAD),
        ),
        _layout(
            "semisup",
            "Semi-supervised: finetuning on a share of the labels",
            ("framework", "method"),
            lambda dims: dims["protocol"].startswith("semisup_") and dims["metric"] == "semisup/top1",
            _method_row,
            lambda dims: (name(dims["dataset"]), dims["title"]),
            numbers,
            notes=unpublished,
        ),
        _layout(
            "7",
            "Detection and segmentation",
            ("framework", "method"),
            lambda dims: _detected(dims) and not dims.get("doubled"),
            _method_row,
            _detection,
            numbers,
        ),
        _layout(
            "7-2x",
            "Detection and segmentation on COCO, schedule 2x",
            ("framework", "method"),
            lambda dims: _detected(dims) and bool(dims.get("doubled")),
            _method_row,
            _detection,
            numbers,
            said=("iterations", "milestones"),
            notes=("Twice as long as the paper's 1x, which stands in table 7: the two are not compared.",),
        ),
    ]
    return {layout.id: layout for layout in tables}


def _in_place(placed: Iterable[tuple[Place, Published]]) -> list[tuple[Place, Published]]:
    """Each number in a cell of its own: one for a cell that has another already gets a row with its source's name."""
    taken: set[Place] = set()
    result = []
    for place, number in placed:
        if place in taken:
            row = (*place[0][:-1], f"{place[0][-1]} ({number.source})")
            place = (row, place[1])
        taken.add(place)
        result.append((place, number))
    return result


# --- without published numbers ---------------------------------------------------------------------------------------


def methods_by_protocols() -> Layout:
    """Ways of pretraining × everything that was measured."""

    def row(dims: Dims) -> Key:
        return (
            name(dims["pretrain_dataset"]),
            name(dims["framework"]),
            name(dims["method"]),
            dims["arch"],
            epochs_name(dims["pretrain_epochs"]),
        )

    def column(dims: Dims) -> Key:
        return name(dims["dataset"]), dims["column"]

    return Layout(
        "methods",
        "Methods × protocols",
        ("pretrained on", "framework", "method", "arch", "epochs"),
        lambda result: [(row(result.dims), column(result.dims))],
        order={**ORDER, **{METRICS[metric]: number for number, metric in enumerate(DETECTION)}},
    )


PIVOT = (
    "dataset",
    "protocol",
    "metric",
    "framework",
    "method",
    "arch",
    "pretrain_dataset",
    "pretrain_epochs",
    *ABLATED,
)


def pivot(rows: Sequence[str], columns: Sequence[str], known: Iterable[str], what: str = "results") -> Layout:
    """Results by any of their dimensions.

    Args:
        rows: What a row is: dimensions (`PIVOT`), or keys of recipes such as ``lr`` and ``pretrain.batch_size``.
        columns: What a column is.
        known: Keys that some result has.
        what: The metric, for the title.

    Raises:
        UserError: If a dimension is unknown, or stands twice.
    """
    valid = dict.fromkeys((*PIVOT, *sorted(known)))
    wrong = [one for one in (*rows, *columns) if one not in valid]
    if wrong:
        raise UserError(f"{', '.join(map(repr, wrong))}: no such dimension. Valid: {', '.join(valid)}")
    both = [*rows, *columns]
    if not rows or not columns or len({*both}) < len(both):
        raise UserError("--rows and --cols name at least one dimension each, none of them twice")

    def text(result: Result, key: str) -> str:
        value = result.dims[key] if key in PIVOT else result.known.get(key)
        return f"{value:,.10g}" if isinstance(value, float) else name(value)

    def places(result: Result) -> Iterable[Place]:
        yield tuple(text(result, key) for key in rows), tuple(text(result, key) for key in columns)

    title = f"{what}: {', '.join(rows)} × {', '.join(columns)}"
    return Layout("pivot", title, tuple(rows), places, order=ORDER)


def choose(table: str | None, published: Sequence[Published]) -> list[Layout]:
    """The layouts for a name, or all.

    Raises:
        UserError: If there is no such table.
    """
    every = {**layouts(published), "methods": methods_by_protocols()}
    nowhere = [number for number in published if number.table not in every]
    if nowhere:
        raise UserError(
            f"published numbers of table {nowhere[0].table!r}: there is no such table. Valid: "
            + ", ".join(id for id in every if id != "methods")
        )
    if table is None:
        return [*every.values()]
    if table not in every:
        raise UserError(f"--table {table}: no such table. Valid: {', '.join(every)}")
    return [every[table]]
