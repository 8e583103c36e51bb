"""What happened to a run, start by start: `journal.jsonl` in its folder.

A start that has no end is one that was killed. Standard library only: the supervisor of a cluster's job reads it too.
"""

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any


class Journal:
    """The journal of one run, to which any process may append.

    Args:
        file: `journal.jsonl` of the run's folder.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def started(self, *, step: int, world_size: int) -> None:
        """All ranks are connected, and the run goes on from a step."""
        self._append("started", step=step, world_size=world_size, host=socket.gethostname(), job=_job())

    def saved(self, *, step: int) -> None:
        """A checkpoint is complete on the disk."""
        self._append("saved", step=step)

    def stopped(self, *, step: int, signal: str) -> None:
        """A signal stopped the run; all that it had done is saved."""
        self._append("stopped", step=step, signal=signal)

    def failed(self, *, step: int, rank: int, host: str, error: str) -> None:
        """A rank came to grief."""
        self._append("failed", step=step, rank=rank, host=host, error=error)

    def finished(self, *, step: int) -> None:
        """The run is at its end."""
        self._append("finished", step=step)

    def read(self) -> list[dict[str, Any]]:
        """All lines so far, the oldest first; half a line at the end, of a process that was killed, is left out."""
        if not self.file.is_file():
            return []
        return [entry for line in self.file.read_text(encoding="utf-8").splitlines() if (entry := _parsed(line))]

    def _append(self, event: str, **what: Any) -> None:
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **what})
        with contextlib.suppress(OSError):  # a run does not need its journal
            descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, f"{line}\n".encode())  # in one call, so that lines of two ranks do not mix
            finally:
                os.close(descriptor)


def _job() -> str | None:
    return os.environ.get("SLURM_JOB_ID")


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "event" in entry else None
