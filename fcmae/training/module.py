"""The Lightning module of pre-training."""

import logging
from typing import Any

import lightning as L
import torch
from torch import Tensor

from fcmae.data.dataset import mix_seed
from fcmae.data.source import Batch
from fcmae.engines.auto import choose
from fcmae.evaluation.trivial import trivial_losses
from fcmae.masking import Mask
from fcmae.models.fcmae import FCMAE
from fcmae.training.optimization import AdamW

log = logging.getLogger(__name__)


class PretrainModule(L.LightningModule):
    """Trains an FCMAE; a step is a function of the weights, the batch, the seed and the step's number.

    Args:
        model: the masked autoencoder.
        optim: optimiser and schedule.
        seed: of masks and drop path.
        description: how the model and its input are made, as plain data; goes into every checkpoint.

    Attributes:
        effective_batch: images per optimiser step, over accumulation, devices and nodes; to be set before the fit.
    """

    def __init__(self, *, model: FCMAE, optim: AdamW, seed: int, description: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.seed = seed
        self.description = description
        self.effective_batch = 0
        self._step_losses: list[Tensor] = []

    def on_fit_start(self) -> None:
        """Says which engine computes; only now is this process's device in use."""
        name = self.model.encoder.engine.name
        log.info("engine: %s", f"{choose(self.device.type)} (auto)" if name == "auto" else name)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # So a resumed run draws the masks that it would have drawn: no state to save, none to lose.
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        torch.manual_seed(mix_seed("step", self.seed, self.global_step, micro_batch, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss on a batch with freshly drawn masks."""
        loss: Tensor = self.model(batch.images).loss
        self._step_losses.append(loss.detach())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        losses, self._step_losses = self._step_losses, []
        if (self.global_step + 1) % self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return  # what is logged is read from the device, and that makes it wait
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.log("train_loss", torch.stack(losses).mean(), sync_dist=True)
        self.log("lr", optimizer.param_groups[0]["lr"])
        self.log("grad_norm", torch.nn.utils.get_total_norm(gradients))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The loss on held-out images with masks that stay the same, beside what trivial predictors reach."""
        mask = self.fixed_mask(batch)
        trivial = trivial_losses(self.model.target, batch.images, mask, self.model.masking.patch_size)
        losses = {
            "val_loss": self.model(batch.images, mask).loss,
            "val_loss_patch_mean": trivial.mean,
            "val_loss_nearest_patch": trivial.nearest,
        }
        self.log_dict(losses, on_epoch=True, sync_dist=True, batch_size=len(batch.images))

    def fixed_mask(self, batch: Batch) -> Mask:
        """Masks that follow from the images' names alone: the same in every run, on every device, in every batch."""
        masks = []
        with torch.random.fork_rng(devices=[]):
            for image, sample_id in zip(batch.images.cpu(), batch.sample_ids, strict=True):
                torch.manual_seed(mix_seed(f"validation {sample_id}"))
                masks.append(self.model.masking(image[None]))
        return Mask(torch.cat([m.visible for m in masks]), torch.cat([m.index for m in masks])).to(batch.images.device)

    def configure_optimizers(self) -> Any:
        """AdamW with its rate set before every step."""
        steps = int(self.trainer.estimated_stepping_batches)
        warmup_steps = (
            self.optim.warmup_epochs * self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        )
        peak = self.optim.peak_lr(self.effective_batch)
        fused = not self.trainer.gradient_clip_val  # Lightning does not clip gradients for fused optimisers
        optimizer = self.optim.optimizer(self.model, lr=peak, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: (
                self.optim.lr_at(step, peak=peak, steps=steps, warmup_steps=warmup_steps) / peak if peak else 0.0
            ),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fcmae"] = self.description
