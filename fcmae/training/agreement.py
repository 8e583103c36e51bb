"""Before every batch, all ranks agree whether to go on: none is left waiting for one that has stopped."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fcmae.stopping import StopRequest, Woken

T = TypeVar("T")


class RunInterrupted(Exception):  # noqa: N818
    """A signal asked the run to stop, and all ranks know it.

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Agreement:
    """The gate that training and validation take their batches through.

    Ranks talk over a gloo group of their own: on the host, so that a GPU goes on computing meanwhile. A rank waits for
    the slowest one here before it begins with a batch. So a rank whose data does not come, and which is woken by a
    signal, finds the others at the same place, and not inside of the exchange of gradients.

    Args:
        request: what signals ask of this process.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self._group: Any = None

    def open(self, timeout: timedelta) -> None:
        """Makes the group; all ranks call it, once they are connected.

        Args:
            timeout: for which the others wait for a rank.
        """
        self._group = dist.new_group(backend="gloo", timeout=timeout)

    def gather(self, fact: T) -> list[T]:
        """What each rank has to say, in the order of ranks."""
        facts: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(facts, fact, group=self._group)
        return facts

    def fetch(self, batches: Iterator[T]) -> T:
        """The next batch, unless any rank has been asked to stop.

        Raises:
            RunInterrupted: one has.
        """
        try:
            batch = self.request.wait_for(batches)
        except Woken:
            batch = None
        self.agree()
        assert batch is not None, "who is woken has been asked to stop"
        return batch

    def agree(self) -> None:
        """Asks all ranks.

        Raises:
            RunInterrupted: one has been asked to stop.
        """
        signum = self.request.signum
        if self._group is not None:
            highest = torch.tensor(signum)
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self._group)
            signum = int(highest)
        if signum:
            raise RunInterrupted(signum)

    def wait(self) -> None:
        """Until all ranks are here."""
        if self._group is not None:
            dist.barrier(self._group)
