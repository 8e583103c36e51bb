"""Writes checkpoints: every so many steps, at the end, and when a signal stops the run."""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from fcmae.checkpoints.format import read_checkpoint
from fcmae.checkpoints.sharded import is_sharded, remove
from fcmae.errors import TransientError, UserError
from fcmae.training.agreement import RunInterrupted
from fcmae.training.callbacks.finite_loss import FiniteLoss
from fcmae.training.callbacks.throughput import Throughput
from fcmae.training.journal import Journal
from fcmae.training.module import TrainingModule
from fcmae.training.sharding import own_rows

log = logging.getLogger(__name__)


class Checkpoints(Checkpoint):
    """Saves `epoch=...-step=....ckpt`, points `last.ckpt` at it, and refreshes what is exported.

    A checkpoint means one thing: so many optimiser steps are done. Where a signal stops the run among the batches of a
    step, or in a validation, the weights are still those after the last whole step, and the loops' progress is saved as
    it was then. After a validation that is better than all before, `best.ckpt` is saved too, which holds the weights
    alone: to be used, not to go on from. A score that is not finite is never the best.

    Args:
        folder: of the checkpoints.
        exported: folder of the exported weights.
        every_n_steps: optimiser steps between checkpoints.
        keep: how many to keep, the newest ones.
        best_by: names of metrics; the best checkpoint is that with the highest one. None of them: no best checkpoint.
        finite_loss: asked before saving.
        throughput: whose clock stands still meanwhile.
        journal: of the run.
    """

    def __init__(
        self,
        *,
        folder: Path,
        exported: Path,
        every_n_steps: int,
        keep: int,
        best_by: Sequence[str],
        finite_loss: FiniteLoss,
        throughput: Throughput,
        journal: Journal,
    ) -> None:
        self.folder = folder
        self.exported = exported
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.best_by = best_by
        self.finite_loss = finite_loss
        self.throughput = throughput
        self.journal = journal
        self._best: dict[str, Any] = {}
        self._loops: dict[str, Any] = {}  # Lightning's, after the last whole step
        self._epoch = 0  # from 1, of that step
        self._saved = 0  # steps of the newest checkpoint

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved = trainer.global_step
        resumed, last = Path(trainer.ckpt_path or ""), self.folder / "last.ckpt"
        if trainer.is_global_zero and (resumed.is_file() or is_sharded(resumed)) and resumed != last:
            _link(resumed, last)  # in case the run was killed between saving and this
        self._best = _standing(self.folder / "best.ckpt")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        scores = {name: float(metrics[name]) for name in self.best_by if name in metrics}
        if trainer.sanity_checking:
            return
        for name in [name for name, score in scores.items() if not math.isfinite(score)]:
            log.warning("%s is %s after step %d: not taken for the best", name, scores.pop(name), trainer.global_step)
        if not scores:
            return
        name = max(scores, key=scores.__getitem__)
        if self._best and scores[name] <= self._best["value"]:
            return
        assert isinstance(pl_module, TrainingModule)
        self._best = {"metric": name, "value": scores[name], "step": trainer.global_step}
        pl_module.standing = self._best
        trainer.save_checkpoint(self.folder / "best.ckpt", weights_only=True)
        pl_module.standing = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._loops, self._epoch = trainer.fit_loop.state_dict(), trainer.current_epoch + 1
        # In a run that went on from an epoch's last batch, Lightning does not count on here; what goes on from this
        # checkpoint would take the epoch for finished, and leave the rest of it out.
        for progress in self._loops["epoch_progress"].values():
            progress.update(ready=self._epoch, started=self._epoch)
        step = trainer.global_step
        last = step >= int(trainer.estimated_stepping_batches) or trainer.should_stop  # as trainer.max_time sets it
        if last or step % self.every_n_steps == 0:
            self._save(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, RunInterrupted) and trainer.global_step > self._saved:
            self._save(trainer, pl_module)  # all ranks are here: they have agreed on it

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if "loops" in checkpoint:  # best.ckpt has none
            checkpoint["loops"]["fit_loop"] = self._loops

    def _save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.finite_loss.check(trainer)
        finite = bool(torch.nn.utils.get_total_norm(own_rows(pl_module), norm_type=math.inf).isfinite())
        if not trainer.strategy.reduce_boolean_decision(finite, all=True):
            raise UserError(
                f"the weights are no longer finite after step {trainer.global_step}; nothing was saved since: "
                "lower optim.base_lr or set trainer.gradient_clip_val=1 under another run_name"
            )
        file = self.folder / f"epoch={self._epoch:04d}-step={trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(file, weights_only=False)
        if trainer.is_global_zero:
            _link(file, self.folder / "last.ckpt")
            self.journal.saved(step=trainer.global_step)
            for old in self._before(file)[self.keep - 1 :]:
                remove(old)
        assert isinstance(pl_module, TrainingModule)
        pl_module.export(self.exported)
        self._saved = trainer.global_step
        self.throughput.resume_clock()

    def _before(self, saved: Path) -> list[Path]:
        """The checkpoints before one that was saved now, the newest first.

        One of a later step is damaged, or the run would have gone on from it: the run comes to it again, and it must
        not be kept in place of one that can be read.
        """
        files = [file for file in self.folder.glob("epoch=*-step=*.ckpt") if file != saved]
        return sorted((file for file in files if _step(file) <= _step(saved)), key=_step, reverse=True)


def _standing(file: Path) -> dict[str, Any]:
    """What the best checkpoint of an interrupted run says of itself."""
    try:
        best: dict[str, Any] = read_checkpoint(file)["fcmae"].get("best", {})
    except TransientError:
        raise
    except UserError:
        return {}
    return best


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
