"""Counts and names the images that could not be read."""

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import lightning as L

from fcmae.data.source import Batch
from fcmae.errors import UserError

log = logging.getLogger(__name__)


class BrokenImages(L.Callback):
    """Names every skipped image once, in the log and in a file, and stops the run when they are too many.

    The file counts for all: every rank adds to it, and so does a run that goes on.

    Args:
        file: JSON lines with the image's id and the reason.
        images: number of images of the source.
        max_broken: share of them at which the run stops; a single one never does.

    Raises, from the hooks:
        UserError: more than `max_broken` of the images are broken.
    """

    def __init__(self, *, file: Path, images: int, max_broken: float) -> None:
        self.file = file
        self.images = images
        self.max_broken = max_broken

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._note(batch)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._note(batch)

    def _note(self, batch: Batch) -> None:
        if not batch.broken:
            return
        noted = self._noted()
        for sample_id, reason in batch.broken:
            if sample_id in noted:
                continue
            noted.add(sample_id)
            log.warning("skipped %s: %s", sample_id, reason)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"id": sample_id, "reason": reason}) + "\n")
        if len(noted) > max(1, self.max_broken * self.images):
            raise UserError(
                f"{len(noted)} of {self.images} images cannot be read (data.max_broken={self.max_broken}): "
                f"see {self.file}, then mend or remove them and delete that file, or raise data.max_broken"
            )

    def _noted(self) -> set[str]:
        noted = set()
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []:
            with contextlib.suppress(ValueError):  # a line that a kill cut short
                noted.add(json.loads(line)["id"])
        return noted
