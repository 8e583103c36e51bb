"""Stops a run whose loss is no longer a number, before that is saved."""

from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from fcmae.data.source import Batch
from fcmae.errors import UserError


class FiniteLoss(L.Callback):
    """Looks at every loss; on the CPU at once, on a GPU when something is logged or saved, to spare it the waiting.

    Raises, from the hooks:
        UserError: a loss is infinite or not a number; names the step and the files of its batch.
    """

    def __init__(self) -> None:
        self._unseen: list[tuple[int, Tensor, list[str]]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._unseen.append((trainer.global_step, outputs["loss"], batch.sample_ids))
        if pl_module.device.type == "cpu" or trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.check(trainer)

    def check(self, trainer: L.Trainer) -> None:
        """Looks at the losses since the last look; all ranks must call it at the same step."""
        unseen, self._unseen = self._unseen, []
        finite = bool(torch.stack([loss.isfinite() for _, loss, _ in unseen]).all()) if unseen else True
        if trainer.strategy.reduce_boolean_decision(finite, all=True):
            return
        messages: list[str | None] = [next((_told(*one) for one in unseen if not one[1].isfinite()), None)]
        if trainer.world_size > 1:
            mine, messages = messages[0], [None] * trainer.world_size
            dist.all_gather_object(messages, mine)
        raise UserError(next(message for message in messages if message is not None))


def _told(step: int, loss: Tensor, files: list[str]) -> str:
    named = ", ".join(files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")
    return (
        f"the loss became {loss.item()} at step {step}, in the batch of {named}; nothing was saved since: "
        "look at these files, or lower optim.base_lr or set trainer.gradient_clip_val=1 in another run_name"
    )
