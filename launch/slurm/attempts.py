"""Which jobs have worked on a cell, and how they ended."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import submitit

from mixmask.engine import ownership
from mixmask.engine.errors import UserError
from mixmask.engine.progress import log_file


@dataclass(frozen=True)
class Place:
    """Where a job runs: its id, the number of this process, and its log. Outside submitit: this process."""

    cluster: str
    job: str
    rank: int
    log: str | None

    @classmethod
    def here(cls) -> Place:
        """Of this process."""
        if "SUBMITIT_EXECUTOR" not in os.environ:
            log = log_file()
            return cls("inline", f"{socket.gethostname()}:{os.getpid()}", 0, None if log is None else str(log))
        env = submitit.JobEnvironment()
        return cls(env.cluster, env.job_id, env.global_rank, str(env.paths.stdout))


class Attempts:
    """``attempts.jsonl``: which jobs have worked on a cell and how they ended."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def write(self, place: Place, event: str, message: str = "") -> None:
        """Add a line; only a job's first process does.

        Raises:
            UserError: If the folder cannot be written.
        """
        if place.rank or ownership.TAKEN_OVER.is_set():  # who has lost the run leaves no word in it
            return
        line = {
            "event": event,
            "job": place.job,
            "host": socket.gethostname(),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "log": place.log,
        }
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line | ({"message": message} if message else {})) + "\n")
        except OSError as error:
            raise UserError(f"{self.file.parent}: cannot be written ({error.strerror or error})") from None

    def read(self) -> list[dict[str, Any]]:
        """All lines; one that a crash left half written, or that is something else, is left out."""
        if not self.file.is_file():
            return []
        found = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and {"event", "job"} <= entry.keys():
                found.append(entry)
        return found

    def last(self, job: str) -> str | None:
        """The newest event of a job."""
        return next((str(line["event"]) for line in reversed(self.read()) if line["job"] == job), None)

    def starts(self, job: str) -> int:
        """How often a job has started; after the first time it had been queued again."""
        return sum(1 for line in self.read() if line["event"] == "started" and line["job"] == job)
