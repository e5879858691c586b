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
    """The job, rank and log of a process; outside submitit, host and process id stand for the job."""

    cluster: str
    job: str
    rank: int
    log: str | None

    @classmethod
    def here(cls) -> Place:
        """The place of the calling process."""
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
        """Append an event; only rank 0 writes.

        Raises:
            UserError: If the folder cannot be written.
        """
        # After a takeover, the run directory belongs to another process.
        if place.rank or ownership.TAKEN_OVER.is_set():
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
        """All events, oldest first; damaged lines, such as one half written in a crash, are skipped."""
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
        """How often a job has started; every start after the first follows a requeue."""
        return sum(1 for line in self.read() if line["event"] == "started" and line["job"] == job)
