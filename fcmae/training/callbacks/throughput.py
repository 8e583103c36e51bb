"""How fast the run is, and how much of the time it waits for data."""

import time
from typing import Any

import lightning as L

from fcmae.training.module import TrainingModule


class Throughput(L.Callback):
    """Logs `images_per_sec`, `batch_time` and `data_time` (seconds per optimiser step), averaged between log lines.

    Reads the clock only: on a GPU the host's time per step settles at the device's, without waiting for it.
    """

    def __init__(self) -> None:
        self.images_per_sec = 0.0
        self.data_share = 0.0
        self._forget()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.resume_clock()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.resume_clock()

    def resume_clock(self) -> None:
        """Leaves out the time since the last step: it went neither into training nor into waiting for data."""
        self._last_end = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += time.perf_counter() - self._last_end

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self._elapsed += now - self._last_end
        self._last_end = now
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._steps += 1
        assert isinstance(pl_module, TrainingModule)
        self.images_per_sec = self._steps * pl_module.effective_batch / self._elapsed
        self.data_share = self._waited / self._elapsed
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log_dict(
                {
                    "images_per_sec": self.images_per_sec,
                    "batch_time": self._elapsed / self._steps,
                    "data_time": self._waited / self._steps,
                }
            )
            self._forget()

    def _forget(self) -> None:
        self._steps, self._elapsed, self._waited = 0, 0.0, 0.0
        self._last_end = time.perf_counter()
