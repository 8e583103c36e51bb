"""The Lightning data module that all sources share."""

import hashlib
import os
import signal
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fcmae.data.dataset import ImageDataset
from fcmae.data.sampler import EpochSampler
from fcmae.data.source import Batch, Source, collate
from fcmae.data.transforms import eval_transform, train_transform
from fcmae.errors import UserError

_SPLIT_SEED = 0  # the held-out images are the same whatever the run's seed


@dataclass(kw_only=True, eq=False)
class ImageDataModule(L.LightningDataModule):
    """Images of one source for pre-training: a random part to learn from, a fixed part held out for validation.

    Args:
        image_size: side, or (height, width), in pixels.
        in_chans: channels of an image.
        mean: per channel, of pixels in [0, 1].
        std: per channel.
        batch_size: images per device and step.
        val_images: how many images to hold out; never more than a fifth of them.
        crop_scale: least and largest share of a picture's area in a training crop.
        flip: mirror every other training picture.
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
    crop_scale: Sequence[float]
    flip: bool
    num_workers: int | str
    max_broken: float
    seed: int

    def __post_init__(self) -> None:
        super().__init__()
        self._check()
        self._loaded: Source | None = None
        self.steps_done = 0
        self._statistics: dict[torch.device, tuple[Tensor, Tensor]] = {}

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

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of random crops; a resumed run goes on at its place in the epoch."""
        trainer = self.trainer
        accumulate, world_size = (trainer.accumulate_grad_batches, trainer.world_size) if trainer else (1, 1)
        indices, _ = self.split()
        transform = train_transform(self.size, (self.crop_scale[0], self.crop_scale[1]), self.flip)
        return self._loader(
            ImageDataset(source=self.source, indices=indices, transform=transform, seed=self.seed),
            EpochSampler(
                size=len(indices),
                batch_size=self.batch_size,
                accumulate=accumulate,
                rank=trainer.global_rank if trainer else 0,
                world_size=world_size,
                seed=self.seed,
                steps_done=self.steps_done,
                max_steps_per_epoch=_whole_steps(trainer) if trainer else None,
            ),
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """The held-out images, centred, always in the same order; ranks share them out."""
        _, indices = self.split()
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        dataset = ImageDataset(source=self.source, indices=indices, transform=eval_transform(self.size), seed=self.seed)
        return self._loader(dataset, [(0, index) for index in range(rank, len(indices), world_size)], most_workers=2)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """uint8 images to normalised float32, on the device, in channels-last memory."""
        return batch._replace(images=self.normalize(batch.images))

    def normalize(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> (x / 255 - mean) / std, float32."""
        images = images.to(torch.float32, memory_format=torch.channels_last)
        mean, std = self._statistics_on(images.device)
        return (images / 255 - mean) / std

    def _statistics_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        # Copied to the device once: every copy makes a GPU wait.
        if device not in self._statistics:
            mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (self.mean, self.std))
            self._statistics[device] = mean, std
        return self._statistics[device]

    def _loader(
        self, dataset: ImageDataset, sampler: EpochSampler | list[tuple[int, int]], most_workers: int = 1000
    ) -> DataLoader[Batch]:
        local_ranks = self.trainer.num_devices if self.trainer else 1
        share = max(1, min(8, _usable_cores() // local_ranks))
        workers = min(most_workers, share if self.num_workers == "auto" else int(self.num_workers))
        return DataLoader(
            dataset,  # type: ignore[arg-type]  # a data set of samples, collated to batches
            sampler=sampler,
            batch_size=self.batch_size,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_signals_to_the_run,
            pin_memory=torch.cuda.is_available(),
        )

    def _check(self) -> None:
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UserError(f"data.crop_scale={list(self.crop_scale)} must be two rising shares in (0, 1], as [0.2, 1]")
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


def _usable_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores


def _leave_signals_to_the_run(worker: int) -> None:
    # Ctrl-C reaches every process of a terminal; the run's own ends its step and then its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
