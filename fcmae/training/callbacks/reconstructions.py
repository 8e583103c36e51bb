"""Pictures of what the model reconstructs, on images and masks that stay the same over the run."""

import logging
from pathlib import Path
from typing import Any

import lightning as L

from fcmae.data.datamodule import ImageDataModule
from fcmae.data.source import Batch
from fcmae.evaluation.reconstruction import picture, reconstruct, save_png
from fcmae.models.targets import DrawableTarget
from fcmae.training.pretraining import PretrainModule

log = logging.getLogger(__name__)


class Reconstructions(L.Callback):
    """Writes `images/epoch=...-step=....png` and `images/latest.png` after validation, with the first held-out images.

    A target without `to_pixels` has none, and the log says so at the start.

    Args:
        folder: where the pictures go.
        pictures: about how many over the whole run; 0 for none.
        images: how many images in a picture.
    """

    def __init__(self, *, folder: Path, pictures: int, images: int = 4) -> None:
        self.folder = folder
        self.pictures = pictures
        self.images = images

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, PretrainModule)
        target = pl_module.model.target
        if self.pictures and not isinstance(target, DrawableTarget):
            self.pictures = 0
            log.info("no pictures of reconstructions: the target, a %s, has no to_pixels", type(target).__name__)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx or not self._due(trainer):
            return
        assert isinstance(pl_module, PretrainModule)
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ImageDataModule)
        shown = batch._replace(images=batch.images[: self.images], seeds=batch.seeds[: self.images])
        reconstruction = reconstruct(pl_module.model, shown.images, pl_module.masks(shown))
        if not trainer.is_global_zero:
            return  # it was needed for the rows of the weights that it has, if they are sharded
        channels = shown.images.shape[1]
        # Values of more bits have no range of their own to show; within 2.5 deviations lies most of them.
        shades = data.numbers if data.normalize.eight_bits else ([0.5] * channels, [0.2] * channels)
        image = picture(reconstruction, *shades)
        save_png(image, self.folder / f"epoch={pl_module.epoch:04d}-step={trainer.global_step:08d}.png")
        save_png(image, self.folder / "latest.png")

    def _due(self, trainer: L.Trainer) -> bool:
        if not self.pictures or trainer.sanity_checking:
            return False
        every = max(1, (trainer.max_epochs or 1) // self.pictures)
        last = trainer.global_step >= int(trainer.estimated_stepping_batches)
        return last or trainer.current_epoch % every == 0
