"""The log that is always on: one JSON object per line."""

import json
import math
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from fcmae.files import write_text


class JsonLinesLogger(Logger):
    """Appends the metrics of a step to `metrics.jsonl`.

    A resumed run does some steps again; their earlier lines are dropped, so that every step stands there once.

    Args:
        file: the log.
    """

    def __init__(self, *, file: Path) -> None:
        super().__init__()
        self.file = file
        self._begun = False

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The run's folder has them in `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Writes one line."""
        steps_done = (step or 0) + 1  # Lightning counts the step that has just been made from 0
        if not self._begun:
            self._begin(steps_done)
        line = {"step": steps_done, **finite(metrics), "time": round(time.time(), 3)}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _begin(self, steps_done: int) -> None:
        self._begun = True
        if self.file.exists():
            lines = self.file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _is_before(line, steps_done)]
            write_text(self.file, "".join(f"{line}\n" for line in kept))


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """With None, `null` in JSON, for what is not finite: JSON has no number for it, and readers fail at bare `NaN`."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _is_before(line: str, steps_done: int) -> bool:
    try:
        return int(json.loads(line)["step"]) < steps_done
    except (ValueError, KeyError, TypeError):  # a line cut off by a kill
        return False
