"""The order of samples, a function of (seed, epoch), and the place in it where a resumed run goes on."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from fcmae.data.randomness import mix_seed


class EpochSampler(Sampler[tuple[int, ...]]):
    """Yields (epoch, index) keys: a new random order every epoch, cut into equal shares for the ranks.

    The order is that of *global batches* of `batch_size * world_size * accumulate` samples; what does not fill the
    last one is left out of the epoch. Micro-batch m of rank r in a global batch is the slice of `batch_size` samples
    at (m * world_size + r) * batch_size.

    Args:
        size: number of samples.
        batch_size: samples per rank and micro-batch.
        accumulate: micro-batches per optimiser step.
        rank: of this process.
        world_size: number of processes.
        seed: of the order.
        steps_done: optimiser steps that a resumed run has behind it; the first pass starts there.
        max_steps_per_epoch: leave an epoch after so many steps.
        weights: (size,), how often each sample is drawn relative to the others: then an epoch draws with replacement,
            and a key has a third number, the place in the order.
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
        weights: Tensor | None = None,
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.weights = weights
        self.steps_per_epoch = size // (batch_size * world_size * accumulate)
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
        generator = torch.Generator().manual_seed(mix_seed("order", self.seed, self.epoch))
        if self.weights is None:
            order = torch.randperm(self.size, generator=generator)
        else:
            upto = self.weights.double().cumsum(0)  # torch.multinomial takes no more than 2^24 samples
            drawn = torch.rand(self.size, dtype=torch.float64, generator=generator) * upto[-1]
            order = torch.searchsorted(upto, drawn, right=True).clamp(max=self.size - 1)
        order = order[: self.steps_per_epoch * self.accumulate * self.world_size * self.batch_size]
        places = torch.arange(len(order)).view(-1, self.world_size, self.batch_size)[:, self.rank]
        start = self.first_step * self.accumulate if self.epoch == self.first_epoch else 0
        for place in places[start:].flatten().tolist():  # of (micro-batches, batch_size)
            index = int(order[place])
            yield (self.epoch, index) if self.weights is None else (self.epoch, index, place)
