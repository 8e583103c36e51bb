"""The progress bar: one for the whole run; in a log file, a line now and then."""

import logging
import time
from datetime import timedelta
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fcmae.training.callbacks.throughput import Throughput
from fcmae.training.module import TrainingModule

log = logging.getLogger(__name__)


class ProgressBar(L.Callback):
    """Shows step, epoch, loss, images/s, the share of time spent waiting for data, and the time left to the run's end.

    Where the output is no terminal, it logs the same as a line every `line_every` seconds instead.

    Args:
        throughput: measures the speed.
        console: where the bar is drawn.
        line_every: seconds between lines where there is no terminal.
    """

    def __init__(self, *, throughput: Throughput, console: Console, line_every: float = 30.0) -> None:
        self.throughput = throughput
        self.console = console
        self.line_every = line_every
        self._bar: Progress | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._steps = int(trainer.estimated_stepping_batches)
        self._first_step, self._started, self._last_line = trainer.global_step, time.monotonic(), time.monotonic()
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.percentage:>3.0f}%"),
                console=self.console,
            )  # fmt: skip
            self._task = self._bar.add_task("starting", total=self._steps, completed=trainer.global_step)
            self._bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        done = trainer.global_step - self._first_step
        if self._bar is not None:
            if trainer.global_step % trainer.log_every_n_steps == 0 or done == 1:  # type: ignore[attr-defined]
                self._bar.update(self._task, description=self._line(trainer))  # reads the loss from the device
            self._bar.update(self._task, completed=trainer.global_step)
        elif time.monotonic() - self._last_line >= self.line_every or trainer.global_step == self._steps:
            self._last_line = time.monotonic()
            log.info(self._line(trainer))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            assert isinstance(pl_module, TrainingModule)
            log.info("epoch %d: %s", pl_module.epoch, pl_module.validation_line())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _line(self, trainer: L.Trainer) -> str:
        done = trainer.global_step - self._first_step
        left = (time.monotonic() - self._started) / done * (self._steps - trainer.global_step)
        loss = trainer.callback_metrics.get("train_loss")
        return (
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} · step {trainer.global_step}/{self._steps} · "
            + (f"loss {float(loss):.4f} · " if loss is not None else "")
            + f"{self.throughput.images_per_sec:.1f} images/s · "
            f"{self.throughput.data_share:.0%} waiting for data · {timedelta(seconds=round(left))} left"
        )

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
