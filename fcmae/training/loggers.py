"""The loggers of a run: `metrics.jsonl` always, others as chosen."""

import logging
import uuid
from pathlib import Path

from lightning.pytorch.loggers import Logger

from fcmae.errors import in_a_line
from fcmae.files import write_text
from fcmae.training.json_lines import JsonLinesLogger
from fcmae.training.run_folder import RunFolder

log = logging.getLogger(__name__)


def start_loggers(chosen: list[Logger], folder: RunFolder) -> list[Logger]:
    """Starts the chosen loggers; one that cannot start is left out with a warning, since a run must not need it."""
    started: list[Logger] = [JsonLinesLogger(file=folder.metrics)]
    for logger in chosen:
        try:
            logger.experiment  # type: ignore[attr-defined]  # noqa: B018  # connects
        except Exception as error:
            log.warning("%s cannot start (%s); the run goes on without it", type(logger).__name__, in_a_line(error))
        else:
            started.append(logger)
    return started


def wandb_run_id(folder: Path) -> str:
    """One Weights & Biases run per run folder, however often it is started."""
    file = folder / "wandb_run_id.txt"
    if not file.exists():
        write_text(file, uuid.uuid4().hex[:12])
    return file.read_text().strip()
