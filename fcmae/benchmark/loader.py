"""How fast images come from the disk, and what that makes of training. Always by the clock on the wall."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fcmae.benchmark import measure
from fcmae.benchmark.conditions import Conditions, environment
from fcmae.benchmark.step import build_optimizer, compile_parts, forward, place
from fcmae.data.datamodule import ImageDataModule
from fcmae.data.source import Batch
from fcmae.models.fcmae import FCMAE

Progress = Callable[[str, int], object]
"""Told that something of this name is done, and how often it will be in all."""


@dataclass(frozen=True)
class LoaderSpeed:
    """What the training loader gives by itself.

    Attributes:
        seconds: for each batch that counts. They come in bursts, so their sum tells, not their median.
        batch_size: images per batch.
        workers: processes that read; 0: the training process itself.
    """

    seconds: tuple[float, ...]
    batch_size: int
    workers: int

    @property
    def images_per_second(self) -> float:
        return self.batch_size * len(self.seconds) / sum(self.seconds)

    @property
    def per_core(self) -> float:
        """Images per second and reading process."""
        return self.images_per_second / max(1, self.workers)


@dataclass(frozen=True)
class TrainingSpeed:
    """Loader, transfer and step together.

    Attributes:
        step: seconds of a step on images that are on the device already.
        seconds: for each whole turn of the loop.
        waited: of those, until the loader gave a batch.
        batch_size: images per step.
    """

    step: measure.Times
    seconds: tuple[float, ...]
    waited: tuple[float, ...]
    batch_size: int

    @property
    def step_images_per_second(self) -> float:
        return self.batch_size / self.step.median

    @property
    def images_per_second(self) -> float:
        return self.batch_size * len(self.seconds) / sum(self.seconds)

    @property
    def waiting(self) -> float:
        """Share of the time in which there was nothing to compute on."""
        return sum(self.waited) / sum(self.seconds)


class Batches:
    """The training loader of a data module, epoch after epoch; its workers live until `close`."""

    def __init__(self, data: ImageDataModule) -> None:
        data.check_enough(data.batch_size, world_size=1, asked_for=False)
        self.batch_size = data.batch_size
        self._loader = data.train_dataloader()
        self.workers = self._loader.num_workers
        self._iterator = _endless(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        return self._iterator

    def close(self) -> None:
        """Ends the workers."""
        del self._iterator, self._loader


def measure_loader(batches: Batches, conditions: Conditions, progress: Progress) -> LoaderSpeed:
    """Times the loader alone.

    The first batches wait in a queue before anyone asks for them: at least two per worker are left out, and at least
    four per worker are timed.
    """
    seconds = []
    warmup = max(conditions.warmup, 2 * batches.workers, 1)
    total = warmup + max(conditions.repeats, 4 * batches.workers)
    for _ in range(total):
        seconds.append(measure.wall_clock(lambda: next(iter(batches))))
        progress("loader", total)
    return LoaderSpeed(tuple(seconds[warmup:]), batches.batch_size, batches.workers)


def measure_training_loop(
    model: FCMAE, data: ImageDataModule, batches: Batches, conditions: Conditions, progress: Progress
) -> TrainingSpeed:
    """Times a step alone, then whole turns of the training loop.

    Every turn waits for the device at its end, so that waiting for data is just that; the workers read on meanwhile.
    """
    place(model, conditions.device)
    if conditions.compile:
        compile_parts(model)
    optimizer = build_optimizer(model) if conditions.optimizer else None

    def step(images: Tensor) -> None:
        forward(model, images, None, conditions.precision).backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()
        if images.is_cuda:
            torch.cuda.synchronize()

    with environment(conditions):
        images = data.normalize(next(iter(batches)).images.to(conditions.device))
        alone = measure.measure_times(
            {"step": lambda: step(images)},
            measure.wall_clock,
            repeats=conditions.repeats,
            warmup=max(1, conditions.warmup),
        )["step"]
        seconds, waited = [], []
        warmup = max(conditions.warmup, 2 * batches.workers)
        total = warmup + conditions.repeats
        for _ in range(total):
            start = time.perf_counter()
            batch = next(iter(batches))
            waited.append(time.perf_counter() - start)
            step(data.normalize(batch.images.to(conditions.device, non_blocking=True)))
            seconds.append(time.perf_counter() - start)
            progress("training", total)
    return TrainingSpeed(alone, tuple(seconds[warmup:]), tuple(waited[warmup:]), data.batch_size)


def _endless(loader: DataLoader[Batch]) -> Iterator[Batch]:
    for epoch in itertools.count():
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        yield from loader
