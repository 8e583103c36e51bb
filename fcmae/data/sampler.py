"""The order of samples, a function of (seed, epoch), and the place in it where a resumed run goes on."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Sampler

from fcmae.data.randomness import mix_seed


class Forecast(Protocol):
    """What is told which samples come next, so that it can have them ready."""

    def begin(self, indices: Tensor) -> None:
        """(N,) int64: the samples that all ranks see in what is left of an epoch, in this order."""
        ...

    def reach(self, place: int) -> None:
        """The ranks are about to read the samples up to this place of them."""
        ...


class EpochSampler(Sampler[tuple[int, ...]]):
    """Yields (pass, index) keys: a new random order every pass over the samples, dealt out to the ranks.

    The order is that of *global batches* of `batch_size * world_size * accumulate` samples; what does not fill an
    epoch's last one is left out. Micro-batch m of rank r in a global batch is the slice of `batch_size` samples at
    (m * world_size + r) * batch_size. An epoch is one pass, unless `samples_per_epoch` is given: then epochs are
    consecutive parts of an endless stream of passes, in which nothing is left out.

    Args:
        size: number of samples.
        batch_size: samples per rank and micro-batch.
        accumulate: micro-batches per optimiser step.
        rank: of this process.
        world_size: number of processes.
        seed: of the order.
        steps_done: optimiser steps that a resumed run has behind it; the first epoch starts there.
        max_steps_per_epoch: leave an epoch after so many steps.
        samples_per_epoch: length of an epoch, rounded down to whole global batches; None for a pass.
        weights: (size,), how often each sample is drawn relative to the others: then a pass draws with replacement,
            and a key has a third number, the place in the order.
        order: of the samples in a pass; by default all mixed with all.
        forecast: told what comes, before every batch.
    """

    def __init__(
        self,
        *,
        size: int,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        steps_done: int = 0,
        max_steps_per_epoch: int | None = None,
        samples_per_epoch: int | None = None,
        weights: Tensor | None = None,
        order: "Order | None" = None,
        forecast: Forecast | None = None,
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.weights = weights
        self.order = order or Order(size)
        self.forecast = forecast
        self.samples_per_epoch = samples_per_epoch
        self.samples_per_step = batch_size * world_size * accumulate
        self.steps_per_epoch = (samples_per_epoch or size) // self.samples_per_step
        if max_steps_per_epoch is not None:
            self.steps_per_epoch = min(self.steps_per_epoch, max_steps_per_epoch)
        self.first_epoch, self.first_step = divmod(steps_done, self.steps_per_epoch)
        self.epoch = self.first_epoch

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch."""
        return self.steps_per_epoch * self.accumulate * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        keys = self._epoch_keys(self.epoch)  # (samples of the epoch, 2 or 3)
        if self.epoch == self.first_epoch:
            keys = keys[self.first_step * self.samples_per_step :]
        if self.forecast is not None:
            self.forecast.begin(keys[:, 1])
        micro_batches = keys.view(-1, self.world_size, self.batch_size, keys.shape[1])[:, self.rank]
        for number, micro_batch in enumerate(micro_batches, start=1):  # (batch_size, 2 or 3)
            if self.forecast is not None:
                self.forecast.reach(number * self.world_size * self.batch_size - 1)
            yield from map(tuple, micro_batch.tolist())

    def _epoch_keys(self, epoch: int) -> Tensor:
        """What all ranks see in an epoch, in this order."""
        count = self.steps_per_epoch * self.samples_per_step
        if self.samples_per_epoch is None:
            return self._pass_keys(epoch)[:count]
        start, keys = epoch * count, []
        while count > 0:
            number, place = divmod(start, self.size)
            keys.append(self._pass_keys(number)[place : place + count])
            start, count = start + len(keys[-1]), count - len(keys[-1])
        return torch.cat(keys)

    def _pass_keys(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(mix_seed("order", self.seed, number))
        if self.weights is None:
            order = self.order(generator)
            return torch.stack([torch.full_like(order, number), order], dim=1)
        upto = self.weights.double().cumsum(0)  # torch.multinomial takes no more than 2^24 samples
        drawn = torch.rand(self.size, dtype=torch.float64, generator=generator) * upto[-1]
        order = torch.searchsorted(upto, drawn, right=True).clamp(max=self.size - 1)
        return torch.stack([torch.full_like(order, number), order, torch.arange(self.size)], dim=1)


class Order:
    """A random order of samples, all mixed with all.

    Args:
        size: number of samples.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, generator: torch.Generator) -> Tensor:
        """(size,) int64, every sample once."""
        return torch.randperm(self.size, generator=generator)


class ShardOrder(Order):
    """A random order of samples that lie together in shards: few shards are in use at a time.

    The shards come in random order; the samples of so many consecutive ones are mixed with each other.

    Args:
        sizes: number of samples in each shard, which lie one after another.
        mixed: number of shards whose samples are mixed.
    """

    def __init__(self, sizes: Sequence[int], *, mixed: int) -> None:
        super().__init__(sum(sizes))
        self.sizes = torch.tensor(list(sizes))
        self.mixed = mixed

    def __call__(self, generator: torch.Generator) -> Tensor:
        """(size,) int64, every sample once."""
        first = self.sizes.cumsum(0) - self.sizes
        parts = []
        for shards in torch.randperm(len(self.sizes), generator=generator).split(self.mixed):
            together = torch.cat([torch.arange(int(first[s]), int(first[s] + self.sizes[s])) for s in shards])
            parts.append(together[torch.randperm(len(together), generator=generator)])
        return torch.cat(parts)
