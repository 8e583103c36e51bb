"""The Lightning data module that all sources share."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fcmae.data.dataset import ImageDataset
from fcmae.data.loader import Normalization, open_loader
from fcmae.data.sampler import EpochSampler
from fcmae.data.source import Batch, Source
from fcmae.data.transforms import Augment
from fcmae.errors import UserError

_SPLIT_SEED = 0  # the held-out images are the same whatever the run's seed


@dataclass(kw_only=True, eq=False)
class ImageDataModule(L.LightningDataModule):
    """Images of one source: a part to learn from, a fixed part held out for validation.

    Args:
        image_size: side, or (height, width), in pixels.
        in_chans: channels of an image.
        mean: per channel, of pixels in [0, 1].
        std: per channel.
        batch_size: images per device and step.
        val_images: how many images to hold out; never more than a fifth of them.
        augment: what becomes of a picture in training and in validation.
        num_workers: processes that read images; `auto` is up to 8, within the cores of this process.
        max_broken: share of unreadable images at which the run stops; a single one never stops it.
        seed: of order and crops.

    Attributes:
        steps_done: optimiser steps that a resumed run has behind it; to be set before the fit.
    """

    image_size: int | Sequence[int]
    in_chans: int
    mean: Sequence[float]
    std: Sequence[float]
    batch_size: int
    val_images: int
    augment: Augment
    num_workers: int | str
    max_broken: float
    seed: int

    def __post_init__(self) -> None:
        super().__init__()
        self._check()
        self._loaded: Source | None = None
        self.steps_done = 0
        self.normalize = Normalization(self.mean, self.std)

    @abstractmethod
    def load_source(self) -> Source:
        """Finds the images.

        Raises:
            UserError: there are none.
        """

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return self.image_size[0], self.image_size[1]

    @property
    def source(self) -> Source:
        """The images, found at first use."""
        if self._loaded is None:
            self._loaded = self.load_source()
        return self._loaded

    def split(self) -> tuple[list[int], list[int]]:
        """Indices into the source: (to learn from, held out).

        Raises:
            UserError: fewer than two images.
        """
        count = len(self.source)
        if count < 2:
            raise UserError(f"{count} image is too few to train on and to validate with: at least 2 are needed")
        held_out = max(1, min(self.val_images, count // 5))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(_SPLIT_SEED)).tolist()
        return sorted(order[held_out:]), sorted(order[:held_out])

    def fingerprint(self) -> str:
        """Changes when images come, go or are renamed."""
        names = "\n".join(self.source.sample_id(index) for index in range(len(self.source)))
        return f"{len(self.source)} images, {hashlib.sha256(names.encode()).hexdigest()[:12]}"

    def check_enough(self, effective_batch: int, *, world_size: int, asked_for: bool) -> None:
        """Refuses an effective batch that is larger than the training set, and ranks without an image to validate.

        Args:
            effective_batch: images per optimiser step.
            world_size: number of ranks.
            asked_for: whether the user gave it, or it follows from `batch_size`.

        Raises:
            UserError: says how large it may be.
        """
        train, held_out = self.split()
        count = len(train)
        if len(held_out) < world_size:
            raise UserError(
                f"{len(held_out)} held-out images are too few for {world_size} devices: "
                "set data.val_images to at least as many, have five times as many images, or use fewer devices"
            )
        if count < effective_batch:
            fitting = f"data.batch_size={max(1, count * self.batch_size // effective_batch)}"
            if asked_for and count >= self.batch_size:
                fitting = f"effective_batch={count // self.batch_size * self.batch_size}"
            raise UserError(
                f"{count} training images are fewer than one effective batch of {effective_batch}: "
                f"use {fitting} or less, or more images"
            )

    def dataset(self, indices: Sequence[int], *, train: bool) -> ImageDataset:
        """Some of the images, as they come to training or to validation."""
        transform = self.augment.train(self.size) if train else self.augment.evaluate(self.size)
        return ImageDataset(source=self.source, indices=indices, transform=transform, seed=self.seed)

    def weights(self) -> Tensor | None:
        """How often each training image is drawn, relative to the others; None: every one once per epoch."""
        return None

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches to learn from; a resumed run goes on at its place in the epoch."""
        trainer = self.trainer
        indices, _ = self.split()
        order = EpochSampler(
            size=len(indices),
            batch_size=self.batch_size,
            accumulate=trainer.accumulate_grad_batches if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            seed=self.seed,
            steps_done=self.steps_done,
            max_steps_per_epoch=_whole_steps(trainer) if trainer else None,
            weights=self.weights(),
        )
        return self._loader(self.dataset(indices, train=True), order)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The held-out images, always in the same order; ranks share them out."""
        _, indices = self.split()
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        order = [(0, index) for index in range(rank, len(indices), world_size)]
        return self._loader(self.dataset(indices, train=False), order, most_workers=2)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """uint8 images to normalised float32, on the device, in channels-last memory."""
        return batch._replace(images=self.normalize(batch.images))

    def _loader(
        self, dataset: ImageDataset, order: EpochSampler | Sequence[tuple[int, ...]], most_workers: int = 1000
    ) -> DataLoader[Batch]:
        return open_loader(
            dataset,
            order,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            most_workers=most_workers,
            local_ranks=self.trainer.num_devices if self.trainer else 1,
        )

    def _check(self) -> None:
        if not isinstance(self.image_size, int) and len(self.image_size) != 2:
            raise UserError(f"data.image_size={list(self.image_size)} must be one number, or [height, width]")
        if not len(self.mean) == len(self.std) == self.in_chans:
            raise UserError(
                f"data.in_chans={self.in_chans}, but {len(self.mean)} means and {len(self.std)} deviations: "
                "give one of each per channel in data.mean and data.std"
            )
        if min(self.std) <= 0:
            raise UserError(f"data.std={list(self.std)} must be positive")
        for name, value, bound in (("batch_size", self.batch_size, 1), ("val_images", self.val_images, 1)):
            if value < bound:
                raise UserError(f"data.{name}={value} must be at least {bound}")
        if self.num_workers != "auto" and (not isinstance(self.num_workers, int) or self.num_workers < 0):
            raise UserError(f"data.num_workers={self.num_workers!r} must be a number from 0, or auto")
        if not 0 <= self.max_broken <= 1:
            raise UserError(f"data.max_broken={self.max_broken} must be a share in [0, 1]")


def _whole_steps(trainer: L.Trainer) -> int | None:
    """Optimiser steps to which `trainer.limit_train_batches=N` shortens an epoch."""
    limit = trainer.limit_train_batches
    return max(1, limit // trainer.accumulate_grad_batches) if isinstance(limit, int) else None
