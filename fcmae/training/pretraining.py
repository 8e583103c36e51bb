"""The Lightning module of pre-training."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from fcmae.data.source import Batch
from fcmae.engines.auto import choose
from fcmae.evaluation.trivial import trivial_losses
from fcmae.masking import Mask
from fcmae.models.block import compiled_block
from fcmae.models.fcmae import FCMAE
from fcmae.training.module import TrainingModule
from fcmae.training.optimization import AdamW

log = logging.getLogger(__name__)


class PretrainModule(TrainingModule):
    """Trains an FCMAE on images with freshly drawn masks.

    Args:
        model: the masked autoencoder.
        optim: optimiser and schedule.
        seed: of drop path.
        description: how the model and its input are made, as plain data; goes into every checkpoint.
    """

    instead_of_demonstration = (
        "For your own images add data=folder data.path=DIR; for the published recipe also experiment=fcmae."
    )

    def __init__(self, *, model: FCMAE, optim: AdamW, seed: int, description: dict[str, Any]) -> None:
        super().__init__(optim=optim, seed=seed, description=description)
        self.model = model
        # Lightning's own mean over ranks divides by the images per rank, rounded down.
        names = ("val_loss", "val_loss_patch_mean", "val_loss_nearest_patch")
        self.losses = nn.ModuleDict({name: MeanMetric(nan_strategy="disable") for name in names})

    @property
    def trained(self) -> nn.Module:
        return self.model

    def compile_network(self) -> None:
        """One graph per stage."""
        self.model.encoder.run_block = self.model.decoder.run_block = compiled_block()

    def check_device(self, device: torch.device) -> None:
        self.model.encoder.engine.check_device(device)

    def report(self) -> list[str]:
        parts = (self.model.encoder, self.model.decoder)
        encoder, decoder = (sum(p.numel() for p in part.parameters()) / 1e6 for part in parts)
        return [f"model: encoder {encoder:.1f} M parameters, decoder {decoder:.1f} M"]

    def on_fit_start(self) -> None:
        """Says which engine computes; only now is this process's device in use."""
        name = self.model.encoder.engine.name
        log.info("engine: %s", f"{choose(self.device.type)} (auto)" if name == "auto" else name)

    def loss(self, batch: Batch) -> Tensor:
        """The loss on hidden patches."""
        loss: Tensor = self.model(batch.images, self.masks(batch)).loss
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The loss on held-out images with masks that stay the same, beside what trivial predictors reach."""
        mask = self.masks(batch)  # a held-out image's seed follows from its name
        trivial = trivial_losses(self.model.target, batch.images, mask, self.model.masking.patch_size)
        losses = {
            "val_loss": self.model(batch.images, mask).loss,
            "val_loss_patch_mean": trivial.mean,
            "val_loss_nearest_patch": trivial.nearest,
        }
        images = 0 if batch.surplus else len(batch.images)
        for name, loss in losses.items():
            self.losses[name].update(loss.expand(images))  # without checks for NaN, torchmetrics ignores weights
        self.log_dict({**self.losses})  # type: ignore[dict-item]  # torch's type is that of any module

    def validation_line(self) -> str:
        metrics = self.trainer.callback_metrics
        return (
            f"validation loss {metrics['val_loss']:.4f} (a patch's own mean reaches "
            f"{metrics['val_loss_patch_mean']:.4f}, its nearest visible patch {metrics['val_loss_nearest_patch']:.4f})"
        )

    def masks(self, batch: Batch) -> Mask:
        """Of the images' own seeds: on any device, in any batch, the same."""
        return self.model.masking(batch.images, batch.seeds)

    def export(self, folder: Path) -> None:
        """Writes `encoder.safetensors`, in timm's names."""
        self.export_weights(self.model.encoder.net, folder / "encoder.safetensors", self.described)
