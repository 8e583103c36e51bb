"""The Lightning data module that all sources share."""

import hashlib
from abc import abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fcmae.data.dataset import ImageDataset
from fcmae.data.loader import Normalization, open_loader
from fcmae.data.sampler import EpochSampler, Forecast, Order
from fcmae.data.source import Batch, Source
from fcmae.data.transforms import Augment
from fcmae.data.watch import WatchedLoader
from fcmae.errors import UserError
from fcmae.stopping import Gate, OpenGate

_SPLIT_SEED = 0  # the held-out images are the same whatever the run's seed


@dataclass(kw_only=True, eq=False)
class ImageDataModule(L.LightningDataModule):
    """Images of one source: a part to learn from, a fixed part held out for validation.

    Args:
        image_size: side, or (height, width), in pixels.
        in_chans: channels of an image.
        mean: per channel, of pixels in [0, 1] (see `Pixels` for more than 8 bits); `auto` is for the command line,
            which measures it, see `channel_statistics`.
        std: per channel; likewise.
        batch_size: images per device and step.
        val_images: how many images to hold out; never more than a fifth of them.
        augment: what becomes of a picture in training and in validation.
        num_workers: processes that read images; `auto` is up to 8, within the cores of this process.
        timeout: seconds to wait for a batch of the worker processes before giving up; 0: for ever.
        max_broken: share of unreadable images at which the run stops; a single one never stops it.
        repeats: samples (crops, with a mask each) from each decoded picture; an epoch decodes every picture once.
        samples_per_epoch: images in an epoch, consecutive parts of an endless stream of passes; null: one pass.
        seed: of order, crops and masks.

    Attributes:
        steps_done: optimiser steps that a resumed run has behind it; to be set before the fit.
    """

    image_size: int | Sequence[int]
    in_chans: int
    mean: Sequence[float] | Literal["auto"]
    std: Sequence[float] | Literal["auto"]
    batch_size: Annotated[int, "auto"]
    val_images: int
    augment: Augment
    num_workers: int | str
    timeout: float
    max_broken: float
    repeats: int
    samples_per_epoch: int | None
    seed: int

    def __post_init__(self) -> None:
        super().__init__()
        self._check()
        self._loaded: Source | None = None
        self.steps_done = 0
        self.gate: Gate = OpenGate()
        self.normalize = Normalization(*self.numbers)

    @property
    def numbers(self) -> tuple[Sequence[float], Sequence[float]]:
        """(mean, deviation) per channel.

        Raises:
            UserError: they are still to be measured.
        """
        if self.mean == "auto" or self.std == "auto":
            raise UserError("data.mean=auto and data.std=auto are measured in training; give numbers here")
        return self.mean, self.std

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

    def split(self) -> tuple[Sequence[int], Sequence[int]]:
        """Indices into the source, ascending: (to learn from, held out).

        Raises:
            UserError: fewer than two images.
        """
        count = len(self.source)
        if count < 2:
            raise UserError(f"{count} image is too few to train on and to validate with: at least 2 are needed")
        return self.hold_out(count, max(1, min(self.val_images, count // 5)))

    def hold_out(self, count: int, held_out: int) -> tuple[Sequence[int], Sequence[int]]:
        """So many of all images at random, always the same ones."""
        order = torch.randperm(count, generator=torch.Generator().manual_seed(_SPLIT_SEED))
        return compact(order[held_out:].sort().values), compact(order[:held_out].sort().values)

    def fingerprint(self) -> str:
        """Changes when images come, go or are renamed."""
        return f"{len(self.source)} images, {self.names_digest()[:12]}"

    def names_digest(self) -> str:
        """A hash of the images' names."""
        digest = hashlib.sha256()
        for index in range(len(self.source)):
            digest.update(f"{self.source.sample_id(index)}\n".encode())
        return digest.hexdigest()

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
        count = self.samples_per_epoch or len(train) * self.repeats
        if len(held_out) < world_size:
            raise UserError(
                f"{len(held_out)} held-out images are too few for {world_size} devices: "
                "set data.val_images to at least as many, have five times as many images, or use fewer devices"
            )
        if count < effective_batch:
            fitting = f"data.batch_size={max(1, count * self.batch_size // effective_batch)}"
            if asked_for and count >= self.batch_size:
                fitting = f"effective_batch={count // self.batch_size * self.batch_size}"
            what = f"data.samples_per_epoch={count}" if self.samples_per_epoch else f"{count} training images"
            raise UserError(
                f"{what} are fewer than one effective batch of {effective_batch}: use {fitting} or less, or more images"
            )

    def epoch_line(self, effective_batch: int) -> str:
        """What an epoch is, for people: a pass over the images, or a part of an endless stream of passes."""
        images = len(self.split()[0])
        count = self.samples_per_epoch or images * self.repeats
        steps = count // effective_batch
        if self.weights() is not None:
            return f"{steps} steps, images drawn by the size of their class, some more than once"
        if self.samples_per_epoch:
            return f"{steps} steps, the next {steps * effective_batch} samples of an endless stream of passes"
        each = f"each image once{f', {self.repeats} crops of it' if self.repeats > 1 else ''}"
        left = (count - steps * effective_batch) // self.repeats
        return f"{steps} steps, {each}{f'; {left} are left out, others in each epoch' if left else ''}"

    def dataset(self, indices: Sequence[int], *, train: bool) -> ImageDataset:
        """Some of the images, as they come to training or to validation."""
        transform = self.augment.train(self.size) if train else self.augment.evaluate(self.size)
        return ImageDataset(
            source=self.source,
            indices=indices,
            transform=transform,
            seed=self.seed if train else None,
            repeats=self.repeats if train else 1,
        )

    def order(self, indices: Sequence[int]) -> Order:
        """How a pass over the training images is ordered; sources that lie in shards know a better way."""
        return Order(len(indices))

    def forecast(self, indices: Sequence[int]) -> Forecast | None:
        """What is to be told which of these images come next; sources that have to fetch them know what to do."""
        return None

    def weights(self) -> Tensor | None:
        """How often each training image is drawn, relative to the others; None: every one once per epoch."""
        return None

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches to learn from; a resumed run goes on at its place in the epoch."""
        trainer = self.trainer
        indices, _ = self.split()
        order = EpochSampler(
            size=len(indices),
            batch_size=self.batch_size // self.repeats,
            accumulate=trainer.accumulate_grad_batches if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            seed=self.seed,
            steps_done=self.steps_done,
            max_steps_per_epoch=_whole_steps(trainer) if trainer else None,
            samples_per_epoch=self.samples_per_epoch and self.samples_per_epoch // self.repeats,
            weights=self.weights(),
            order=self.order(indices),
            forecast=self.forecast(indices),
        )
        loader = self._loader(self.dataset(indices, train=True), order, pictures=self.batch_size // self.repeats)
        loader.gate = self.gate
        return loader

    def val_dataloader(self) -> DataLoader[Batch]:
        """The held-out images, always in the same order; ranks share them out.

        All ranks have equally many batches, or those with more would wait for the others: to agree on going on, and,
        where the network is sharded, for their rows of it. Who lacks one repeats an image in a surplus batch.
        """
        _, indices = self.split()
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        order = [(0, index) for index in range(rank, len(indices), world_size)]
        surplus = len(order) * world_size < len(indices) and len(order) % self.batch_size == 0
        if surplus:  # the first ranks have one image more than this one, and a batch for it
            order.append((0, rank % len(indices)))
        loader = self._loader(self.dataset(indices, train=False), order, pictures=self.batch_size, most_workers=2)
        loader.gate, loader.surplus = self.gate, surplus
        return loader

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Pixels to normalised float32, on the device, in channels-last memory."""
        return batch._replace(images=self.normalize(batch.images))

    def _loader(
        self,
        dataset: ImageDataset,
        order: EpochSampler | Sequence[tuple[int, ...]],
        *,
        pictures: int,
        most_workers: int = 1000,
    ) -> WatchedLoader:
        return open_loader(
            dataset,
            order,
            batch_size=pictures,
            num_workers=self.num_workers,
            most_workers=most_workers,
            local_ranks=self.trainer.num_devices if self.trainer else 1,
            timeout=self.timeout,
        )

    def _check(self) -> None:
        if not isinstance(self.image_size, int) and len(self.image_size) != 2:
            raise UserError(f"data.image_size={list(self.image_size)} must be one number, or [height, width]")
        mean, std = self.numbers
        if not len(mean) == len(std) == self.in_chans:
            raise UserError(
                f"data.in_chans={self.in_chans}, but {len(mean)} means and {len(std)} deviations: give one of each per "
                "channel in data.mean and data.std, or data.mean=auto data.std=auto"
            )
        if min(std) <= 0:
            raise UserError(f"data.std={list(std)} must be positive")
        for name in ("batch_size", "val_images", "repeats", "samples_per_epoch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"data.{name}={value} must be at least 1")
        if self.batch_size % self.repeats:
            raise UserError(
                f"data.batch_size={self.batch_size} is no multiple of data.repeats={self.repeats}: "
                f"use {self.batch_size // self.repeats * self.repeats or self.repeats}"
            )
        if self.num_workers != "auto" and (not isinstance(self.num_workers, int) or self.num_workers < 0):
            raise UserError(f"data.num_workers={self.num_workers!r} must be a number from 0, or auto")
        if self.timeout < 0:
            raise UserError(f"data.timeout={self.timeout} must be a number of seconds, or 0 for no end")
        if not 0 <= self.max_broken <= 1:
            raise UserError(f"data.max_broken={self.max_broken} must be a share in [0, 1]")


def compact(indices: Tensor) -> Sequence[int]:
    """(N,) int64 as numbers that worker processes share: a list's are copied into each, reference count by count."""
    return array("q", indices.numpy().tobytes())


def _whole_steps(trainer: L.Trainer) -> int | None:
    """Optimiser steps to which `trainer.limit_train_batches=N` shortens an epoch."""
    limit = trainer.limit_train_batches
    return max(1, limit // trainer.accumulate_grad_batches) if isinstance(limit, int) else None
