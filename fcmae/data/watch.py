"""What the processes of a loader are reading: when one dies or hangs, the picture that it did so at has a name."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from fcmae.data.dataset import ImageDataset
from fcmae.data.source import Batch
from fcmae.errors import TransientError
from fcmae.stopping import Gate, OpenGate

_LONGEST = 512  # bytes of a name


class Reading:
    """The picture that each worker opened last, in memory that all processes share.

    Args:
        workers: number of them.
    """

    def __init__(self, workers: int) -> None:
        self._names = torch.zeros(workers, _LONGEST, dtype=torch.uint8).share_memory_()

    def __call__(self, sample_id: str) -> None:
        """Called in a worker."""
        info = get_worker_info()
        if info is not None:
            name = sample_id.encode()[-_LONGEST:]
            padded = name + bytes(_LONGEST - len(name))
            self._names[info.id] = torch.frombuffer(bytearray(padded), dtype=torch.uint8)

    def name(self, worker: int) -> str:
        """The name of that picture, or its end; empty if there was none."""
        return _text(self._names[worker])


class WatchedLoader(DataLoader[Batch]):
    """A loader that says at which picture a worker died, or did nothing for `timeout` seconds.

    Attributes:
        gate: asked before each batch.
        surplus: whether the last batch is there only so that all ranks have equally many; `Batch.surplus` says so.

    Raises, from its iterator:
        TransientError: a worker did.
    """

    dataset: ImageDataset  # type: ignore[assignment]  # a data set of samples, collated to batches

    def __init__(self, dataset: ImageDataset, **options: Any) -> None:
        super().__init__(dataset, **options)  # type: ignore[arg-type]
        self.gate: Gate = OpenGate()
        self.surplus = False
        self._reading = Reading(self.num_workers)
        if self.num_workers:
            dataset.reading = self._reading

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        batches: Any = super().__iter__()
        deaths = _Deaths.watched()
        for number in itertools.count(1):
            try:
                with deaths.heard():
                    if self._dead(batches):
                        raise RuntimeError("they died since the last batch")
                    batch = self.gate.fetch(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:  # the last two: a batch of a worker that is gone
                reason = self._reason(batches, str(error))
                if reason is None:
                    raise
                raise TransientError(reason) from error
            yield batch._replace(surplus=True) if self.surplus and number == len(self) else batch

    def _dead(self, batches: Any) -> list[int]:
        """Workers that should live, by number."""
        workers = getattr(batches, "_workers", [])
        return [number for number, worker in enumerate(workers) if not worker.is_alive()]

    def _reason(self, batches: Any, message: str) -> str | None:
        """What happened to the workers, if that is it."""
        names = [self._reading.name(number) or "nothing yet" for number in range(self.num_workers)]
        if dead := self._dead(batches):
            return (
                f"a process that reads images died while it read {', '.join(names[number] for number in dead)}: the "
                "machine may be out of memory (lower data.num_workers), or the file crashes its decoder (leave it out)"
            )
        if "timed out after" in message:
            return (
                f"no batch came for {self.timeout:g} seconds while the processes read {', '.join(names)}: see whether "
                "the disk or the network answers, or raise data.timeout"
            )
        return None


class _Deaths:
    """Lets torch's handler of SIGCHLD, which raises, notice dead workers where a batch is waited for, and only there.

    It would do so wherever the main thread is: in a step, in a save.

    Args:
        handler: torch's.
    """

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self._handler = handler
        self._heard = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self._heard:
            self._handler(signum, frame)

    @classmethod
    def watched(cls) -> "_Deaths":
        """What the process's table of handlers holds, put there if need be."""
        now = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        if isinstance(now, cls):
            return now
        deaths = cls(now if callable(now) else lambda *_: None)
        if callable(now) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, deaths)
        return deaths

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Noticed meanwhile."""
        self._heard = True
        try:
            yield
        finally:
            self._heard = False


def _text(name: Tensor) -> str:
    return bytes(name.tolist()).rstrip(b"\0").decode(errors="replace")
