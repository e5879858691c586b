"""Converting a backbone as a run of its own: what a suite does between pretraining and transfer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from mixmask.engine.run import Work
from mixmask.engine.storage import RunDirectory
from mixmask.transfer.checkpoints.export import Target, check_export, export
from mixmask.transfer.checkpoints.source import read_source


@dataclass(frozen=True)
class Conversion(Work[Path]):
    """The conversion of one backbone to one format; the target library reads the result back.

    Attributes:
        run: The run directory.
        source: The backbone's file.
        out: The file to write.
        target: The format, one of `export.TARGETS`.
    """

    run: RunDirectory
    source: Path
    out: Path
    target: Target

    @override
    def finished(self) -> Path | None:
        return self.out if self.out.is_file() else None

    @override
    def work(self) -> Path:
        found = read_source(self.source)
        check_export(found, self.out, self.target)
        written = export(found, self.out, self.target)
        print(f"source    {self.source}\n{found.tensor_report.summary()}\nwritten   {written}")
        return self.out
