"""Remote shards are fetched before anybody waits for them."""

import contextlib
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from fcmae.data.loader import leave_signals_to_the_run
from fcmae.errors import UserError

Fetch = Callable[[int], object]
"""Puts a shard, by its number, where its readers look for it; raises a `UserError` if it cannot."""


class FetchAhead:
    """A process that fetches shards in the order in which their samples come, so many ahead of those being read.

    Whoever reads a shard that is not there yet fetches it as ever, or waits until this process has done so. A process,
    because a thread would take time from the one that launches the training step's work.

    Args:
        fetch: sent to the process.
        shards: (N,) int64, the shard of each sample.
        ahead: fetch at most so many shards that nobody has come to.
    """

    def __init__(self, fetch: Fetch, shards: Tensor, *, ahead: int) -> None:
        self._fetch = fetch
        self._shards = shards
        self._ahead = ahead
        self._coming: Sequence[int] = []  # shards, in the order in which they are needed
        self._places = torch.empty(0, dtype=torch.int64)  # where in the order of samples each is first needed
        self._asked = 0
        self._orders: Connection | None = None

    def begin(self, indices: Tensor) -> None:
        """(N,) int64: the samples to come, in their order."""
        shards, whose = self._shards[indices].unique(return_inverse=True)
        first = torch.full((len(shards),), len(indices))
        first.scatter_reduce_(0, whose, torch.arange(len(indices)), reduce="amin")
        self._places, order = first.sort()
        self._coming, self._asked = shards[order].tolist(), 0

    def reach(self, place: int) -> None:
        """The samples up to this place are about to be read."""
        upto = int(torch.searchsorted(self._places, place, right=True)) + self._ahead
        wanted = self._coming[self._asked : upto]
        if not wanted:
            return
        self._asked += len(wanted)
        if self._orders is None:
            self._orders = _start(self._fetch)
        with contextlib.suppress(OSError):  # it is gone: whoever reads a shard fetches it
            self._orders.send(wanted)


def _start(fetch: Fetch) -> Connection:
    """A process that fetches what is sent, until this one ends or forgets the connection."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_work, args=(receiver, sender, fetch), name="fetch-ahead", daemon=True)
    process.start()
    receiver.close()
    return sender


def _work(orders: Connection, other_end: Connection, fetch: Fetch) -> None:
    leave_signals_to_the_run(0)
    other_end.close()  # a fork has it too, and would never hear that it was closed
    with contextlib.suppress(EOFError):
        while True:
            for shard in orders.recv():
                with contextlib.suppress(UserError):  # whoever reads the shard says why it cannot be had
                    fetch(shard)
