"""Methods × protocols: one row per way of pretraining, one column per transfer result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pandas as pd

from engine.records import Record

TableFormat = Literal["md", "csv"]

# protocol, metric in the record, column title
COLUMNS = (
    ("knn", "knn/top1", "kNN top-1"),
    ("linear", "linear/top1", "linear top-1"),
    ("semisup_1", "semisup/top1", "1 % labels top-1"),
    ("semisup_10", "semisup/top1", "10 % labels top-1"),
    ("semisup_100", "semisup/top1", "100 % labels top-1"),
    ("detect_voc", "bbox/AP", "VOC AP"),
    ("detect_voc", "bbox/AP50", "VOC AP50"),
    ("detect_voc", "bbox/AP75", "VOC AP75"),
    ("detect_coco", "bbox/AP", "COCO box AP"),
    ("detect_coco", "bbox/AP50", "COCO box AP50"),
    ("detect_coco", "bbox/AP75", "COCO box AP75"),
    ("detect_coco", "segm/AP", "COCO mask AP"),
    ("detect_coco", "segm/AP50", "COCO mask AP50"),
    ("detect_coco", "segm/AP75", "COCO mask AP75"),
)
METHODS = ("random", "vanilla", "mscn", "unmix", "mixmask", "mixmask+unmix", "unknown")
ROW = ["pretrained on", "framework", "method", "arch", "epochs"]


def _other_percentages(records: Sequence[Record]) -> list[tuple[str, str, str]]:
    known = {protocol for protocol, _, _ in COLUMNS}
    extra = {r.protocol for r in records if r.protocol.startswith("semisup_")} - known
    shares = sorted(float(protocol.removeprefix("semisup_")) for protocol in extra)
    return [(f"semisup_{share:g}", "semisup/top1", f"{share:g} % labels top-1") for share in shares]


def methods_by_protocols(records: Sequence[Record]) -> pd.DataFrame:
    """The table.

    Rows are ways of pretraining, columns are results in percent, named with the data set they were measured on. A cell
    is a mean over seeds, with the number of runs when there are several; a protocol that was not run is empty. Only runs
    whose pretraining recipes agree in everything but the seed share a row, and only runs whose transfer recipes do share
    a column: where the names alone would not tell them apart, settings or the first digits of a fingerprint do.

    Args:
        records: Of any stage; pretraining records are not shown, and the same work counts once whatever its name.
    """
    transfers = list({record.fingerprint: record for record in records if record.stage == "transfer"}.values())
    rows: dict[tuple[str, ...], dict[str, list[float]]] = {}
    order: dict[str, tuple[int, str]] = {}
    columns = [*COLUMNS, *_other_percentages(records)]
    for record in transfers:
        key = _row(record, transfers)
        for position, (protocol, metric, title) in enumerate(columns):
            if record.protocol == protocol and metric in record.metrics:
                full = f"{record.dataset}: {title}{_distinction(record, transfers)}"
                order[full] = (position, full)
                rows.setdefault(key, {}).setdefault(full, []).append(record.metrics[metric])
    names = sorted(order, key=order.__getitem__)
    ordered = sorted(rows, key=lambda key: (key[0], key[1], METHODS.index(key[2].split(" ")[0]), key[2:]))
    body = [[*key, *(_cell(rows[key].get(name, [])) for name in names)] for key in ordered]
    return pd.DataFrame(body, columns=[*ROW, *names])


def _row(record: Record, records: Sequence[Record]) -> tuple[str, ...]:
    """What stands in the first columns; pretrainings that would look alike get the start of their lineage."""

    def shown(r: Record) -> tuple[str, ...]:
        epochs = "?" if r.pretrain_epochs is None else f"{r.pretrain_epochs:g}"
        return (r.pretrain_dataset or "?", r.framework, r.method, r.arch, epochs)

    key = shown(record)
    if len({r.lineage for r in records if shown(r) == key}) > 1:
        return (*key[:2], f"{key[2]} [{record.lineage[:6]}]", *key[3:])
    return key


def _distinction(record: Record, records: Sequence[Record]) -> str:
    """What tells a record's transfer recipe from others of its protocol and data set, for the column's title."""
    peers = [r for r in records if r.protocol == record.protocol and r.dataset == record.dataset]
    if len({r.protocol_fingerprint for r in peers}) == 1:
        return ""
    differing = sorted(
        name
        for name in {name for peer in peers for name in peer.settings}
        if len({repr(peer.settings.get(name)) for peer in peers}) > 1
    )
    parts = [f"{name} {record.settings.get(name)}" for name in differing]
    alike = [r for r in peers if all(r.settings.get(n) == record.settings.get(n) for n in differing)]
    if len({r.protocol_fingerprint for r in alike}) > 1:
        parts.append(f"recipe {record.protocol_fingerprint[:6]}")
    return f" ({', '.join(parts)})"


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} (n={len(values)})"


def render(table: pd.DataFrame, form: TableFormat) -> str:
    """The table as Markdown or CSV text, ending in a newline."""
    if form == "csv":
        return str(table.to_csv(index=False))
    escaped = table.map(lambda cell: str(cell).replace("|", "\\|"))
    escaped.columns = pd.Index([str(name).replace("|", "\\|") for name in table.columns])
    return f"{escaped.to_markdown(index=False, disable_numparse=True)}\n"
