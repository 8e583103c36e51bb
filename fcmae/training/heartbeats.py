"""Who of several ranks no longer lives, and how far it came: told by what each writes to the store they share."""

import json
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

_EVERY = 1.0  # seconds between beats
_SILENT = 3.0  # seconds without one that mean silence


@dataclass(frozen=True)
class Silent:
    """A rank that gives no sign of life.

    Attributes:
        rank: of all processes.
        host: on which it ran.
        step: optimiser steps that it had done a second or two before.
    """

    rank: int
    host: str
    step: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (last heard of at step {self.step})"


class Heartbeats:
    """Writes beats of this rank from a thread, as long as the process runs; reads those of the others when asked.

    Args:
        hosts: of all ranks.
        step: from which the run goes on.

    Attributes:
        step: optimiser steps that this rank has done; to be kept up to date.
    """

    def __init__(self, hosts: list[str], *, step: int) -> None:
        self.step = step
        self._hosts = hosts
        self._rank = dist.get_rank()
        self._store: Any = dist.PrefixStore("fcmae", _get_default_store().clone())  # a connection of the thread's own
        self._known = [(0, step)] * len(hosts)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeats")

    def start(self) -> None:
        """Begins to beat."""
        self._thread.start()

    def stop(self) -> None:
        """Beats no more."""
        self._stop.set()
        self._thread.join()

    def of(self, rank: int) -> Silent:
        """What is known of a rank that has ended."""
        self.stop()
        try:
            return Silent(rank, self._hosts[rank], self._read()[rank][1])
        except Exception:  # whatever a store that is gone raises
            return Silent(rank, self._hosts[rank], self._known[rank][1])

    def silent(self) -> list[Silent]:
        """The ranks that did not beat for three seconds; rank 0 keeps the store, so without it nobody is heard."""
        self.stop()  # the connection is this thread's from here on
        try:
            before = self._read()
            until = time.monotonic() + _SILENT
            while time.monotonic() < until:
                time.sleep(_EVERY / 2)
                self._store.set(str(self._rank), self._beat_now())
            after = self._read()
        except Exception:  # whatever a store that is gone raises
            return [Silent(0, self._hosts[0], self._known[0][1])] if self._rank else []
        return [
            Silent(rank, self._hosts[rank], after[rank][1])
            for rank in range(len(after))
            if rank != self._rank and after[rank][0] == before[rank][0]
        ]

    def _beat(self) -> None:
        self._number = 0
        self._store.set_timeout(timedelta(seconds=10))
        while not self._stop.wait(_EVERY):
            try:
                self._store.set(str(self._rank), self._beat_now())
                if self._rank:
                    self._known[0] = _parsed(self._store.get("0"))
            except Exception:  # the main thread will notice, and ask
                return

    def _beat_now(self) -> str:
        self._number += 1
        return json.dumps([self._number, self.step])

    def _read(self) -> list[tuple[int, int]]:
        names = [str(rank) for rank in range(len(self._hosts))]
        return [
            _parsed(self._store.get(name)) if self._store.check([name]) else known
            for name, known in zip(names, self._known, strict=True)
        ]


def hostname() -> str:
    """Of this machine."""
    return socket.gethostname()


def _parsed(beat: bytes) -> tuple[int, int]:
    number, step = json.loads(beat)
    return int(number), int(step)
