"""Writes checkpoints: every so many steps, at the end, and when the user interrupts."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from fcmae.checkpoints.export import export_encoder
from fcmae.errors import UserError
from fcmae.training.callbacks.finite_loss import FiniteLoss
from fcmae.training.module import PretrainModule


class RunInterrupted(Exception):  # noqa: N818
    """The user pressed Ctrl-C, and what was trained is saved."""


class Checkpoints(Checkpoint):
    """Saves `epoch=...-step=....ckpt`, points `last.ckpt` at it, and refreshes the exported encoder.

    Only ever after a whole optimiser step, so that a checkpoint means one thing: so many steps are done. The first
    Ctrl-C ends the step under way, saves and stops; the second stops at once.

    Args:
        folder: of the checkpoints.
        exported: folder of the exported encoder.
        every_n_steps: optimiser steps between checkpoints.
        keep: how many to keep, the newest ones.
        finite_loss: asked before saving.
    """

    def __init__(self, *, folder: Path, exported: Path, every_n_steps: int, keep: int, finite_loss: FiniteLoss) -> None:
        self.folder = folder
        self.exported = exported
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.finite_loss = finite_loss
        self._interrupted = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        def on_interrupt(signum: int, frame: Any) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        self._previous_handler = signal.signal(signal.SIGINT, on_interrupt)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        signal.signal(signal.SIGINT, self._previous_handler)  # Lightning calls no teardown after an exception

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        signal.signal(signal.SIGINT, self._previous_handler)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        interrupted = self._agree_on_interrupt(trainer)
        if interrupted or step % self.every_n_steps == 0 or step >= int(trainer.estimated_stepping_batches):
            self._save(trainer, pl_module)
        if interrupted:
            raise RunInterrupted

    def _agree_on_interrupt(self, trainer: L.Trainer) -> bool:
        if trainer.world_size == 1:
            return self._interrupted
        # Asking the other ranks makes a GPU wait, so not at every step.
        due = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        return due and trainer.strategy.reduce_boolean_decision(self._interrupted, all=False)

    def _save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.finite_loss.check(trainer)
        if not torch.nn.utils.get_total_norm(pl_module.parameters(), norm_type=math.inf).isfinite():
            raise UserError(
                f"the weights are no longer finite after step {trainer.global_step}; nothing was saved since: "
                "lower optim.base_lr or set trainer.gradient_clip_val=1 under another run_name"
            )
        file = self.folder / f"epoch={trainer.current_epoch + 1:04d}-step={trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(file, weights_only=False)
        if trainer.is_global_zero:
            assert isinstance(pl_module, PretrainModule)
            _link(file, self.folder / "last.ckpt")
            for old in sorted(self.folder.glob("epoch=*-step=*.ckpt"), key=_step)[: -self.keep]:
                old.unlink()
            export_encoder(pl_module.model.encoder, self.exported, pl_module.description)


def _step(file: Path) -> int:
    return int(file.stem.rpartition("step=")[2])


def _link(file: Path, link: Path) -> None:
    """Makes `link` another name of `file`, in one step."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(file)
    except OSError:  # a file system without hard links
        temporary.symlink_to(file.name)
    temporary.replace(link)
