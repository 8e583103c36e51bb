"""Why a run of several ranks ends: which of them no longer lives, or failed; told by what all write to one store."""

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

_EVERY = 1.0  # seconds between beats
_SILENT = 3.0  # seconds without one that mean silence
_ANSWER = 10.0  # seconds in which a store that works has answered
_GRACE = 5.0  # seconds for the main thread to end by itself when the run ends
_WORD = "fault"  # the store's key for what ends the run
_POLL = 0.1
LOST = "no longer answers"
HUNG = "does not go on"
T = TypeVar("T")


@dataclass(frozen=True)
class Fault:
    """What ends the run of all ranks.

    Attributes:
        rank: of all processes, to which it happened.
        host: on which that ran.
        step: optimiser steps that it had done, a second or two before if it is lost.
        error: what happened, in a line.
        refused: it is something that the user must mend.
    """

    rank: int
    host: str
    step: int
    error: str = LOST
    refused: bool = False


class Beat(NamedTuple):
    """A sign of life: its number, optimiser steps done, and whether the rank is about to end."""

    number: int
    step: int
    ends: bool


class Heartbeats:
    """Writes beats of this rank from a thread, as long as the process runs; finds out whose are missing when asked.

    When another rank tells why the run ends, the main thread mostly finds out by itself, as connections break. If it
    does not, because it waits for a device or for a rank that waits too, the thread ends the process.

    Nothing here waits for the store without a bound: rank 0 keeps it, and may be the one that is stopped.

    Args:
        hosts: of all ranks.
        step: from which the run goes on.
        run: a name that no other run of these processes has.
        leave: ends the process, given why.

    Attributes:
        step: optimiser steps that this rank has done; to be kept up to date.
    """

    def __init__(self, hosts: list[str], *, step: int, run: str, leave: Callable[[list[Fault]], object]) -> None:
        self.step = step
        self._hosts = hosts
        self._leave = leave
        self._rank = dist.get_rank()
        connection = _get_default_store().clone()  # the thread's own
        self._store: Any = dist.PrefixStore(f"fcmae {run}", connection)
        self._known = [Beat(0, step, False)] * len(hosts)
        self._ends = False
        self._faults: list[Fault] = []
        self._number = 0
        self._paused = 0.0
        self._made = 0
        self._awaited = ""  # the store's key for what this rank waits for
        self._came: bytes | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeats")

    def start(self) -> None:
        """Begins to beat."""
        self._store.set(str(self._rank), self._next())  # at once: the others wait for the first
        self._thread.start()

    def stop(self) -> None:
        """Beats no more."""
        self._stop.set()
        self._thread.join(_ANSWER)

    def from_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, however long that takes: the others wait as long as it lives. All ranks call it.

        Args:
            make: a value that JSON can hold.

        Raises:
            RuntimeError: rank 0 is gone, or the run ends.
        """
        self._made += 1
        name = f"made {self._made}"
        if self._rank == 0:
            value = make()
            self._store.set(name, json.dumps(value))
            return value
        self._came, self._awaited = None, name
        while self._came is None:
            if self._faults or not self._thread.is_alive():
                raise RuntimeError("rank 0 is lost, or failed, while the others waited for what it makes")
            time.sleep(_POLL)
        result: T = json.loads(self._came)
        return result

    def judge(self, own: Fault, *, sure: bool, timed_out: bool, ended: Sequence[int]) -> tuple[list[Fault], bool]:
        """Why the run ends: all ranks are told the same, what the first of them has found.

        Args:
            own: what happened to this rank.
            sure: that did not happen because of others.
            timed_out: it waited for others in vain.
            ended: ranks whose processes this one has seen end.

        Returns:
            faults: one, or several ranks that are lost together.
            first: whether this rank is the one to write that down.
        """
        self.stop()  # the connection is used from here on
        found = None
        if not self._thread.is_alive():
            found = _within(3 * _ANSWER, lambda: self._judge(own, sure, timed_out, ended))
        if found is not None:
            return found
        if self._faults:  # heard of while the store was there
            return self._faults, False
        if self._paused:
            return [Fault(self._rank, own.host, own.step, f"did not run for {self._paused:.0f} seconds")], True
        return ([Fault(0, self._hosts[0], self._known[0].step)] if self._rank else [own]), True

    def linger(self) -> None:
        """Keeps the store open until all ranks have heard why the run ends."""
        if self._rank == 0:
            time.sleep(3 * _EVERY)

    def _judge(self, own: Fault, sure: bool, timed_out: bool, ended: Sequence[int]) -> tuple[list[Fault], bool]:
        if faults := self._told():
            return faults, False
        if sure:
            return self._tell([own])
        if ended:
            beats = self._read()
            return self._tell([Fault(rank, self._hosts[rank], beats[rank].step) for rank in ended])
        self._ends = True
        before, after = self._read(), self._watch(_SILENT)
        others = [rank for rank in range(len(after)) if rank != self._rank]
        found = {rank: LOST for rank in others if after[rank].number == before[rank].number}
        if timed_out and not found:  # then so have all but those that were waited for
            after = self._watch(2 * _SILENT)
            found = {rank: HUNG for rank in others if not after[rank].ends}
        return self._tell(
            [Fault(rank, self._hosts[rank], after[rank].step, error) for rank, error in found.items()] or [own]
        )

    def _watch(self, seconds: float) -> list[Beat]:
        """The beats of all ranks after a while in which this one goes on with its own."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(_EVERY / 2)
            self._store.set(str(self._rank), self._next())
        return self._read()

    def _told(self) -> list[Fault]:
        return _faults(self._store.get(_WORD))[1] if self._store.check([_WORD]) else []

    def _tell(self, faults: list[Fault]) -> tuple[list[Fault], bool]:
        """Tells all, unless another rank did so just before: then that holds."""
        mine = json.dumps([self._rank, [asdict(fault) for fault in faults]])
        by, told = _faults(self._store.compare_set(_WORD, "", mine))
        return told, by == self._rank

    def _beat(self) -> None:
        self._store.set_timeout(timedelta(seconds=_ANSWER))
        before = time.monotonic()
        while not self._faults:
            if self._stop.wait(_EVERY):
                return
            if (gap := time.monotonic() - before) > _ANSWER:
                self._paused = gap
            try:
                self._store.set(str(self._rank), self._next())
                self._faults = self._told()
                if self._rank:
                    self._known[0] = _parsed(self._store.get("0"))
                    self._look()
            except Exception:  # whatever a store that is gone raises; the main thread will notice, and ask
                return
            before, self._paused = time.monotonic(), 0.0  # the others still want this rank
        if not self._stop.wait(_GRACE):
            self._leave(self._faults)

    def _look(self) -> None:
        """Whether what is waited for has come."""
        if self._awaited and self._store.check([self._awaited]):
            self._came, self._awaited = self._store.get(self._awaited), ""

    def _next(self) -> str:
        self._number += 1
        return json.dumps([self._number, self.step, self._ends])

    def _read(self) -> list[Beat]:
        names = [str(rank) for rank in range(len(self._hosts))]
        if self._store.check(names):
            return [_parsed(beat) for beat in self._store.multi_get(names)]
        return [  # one of them was lost before its first beat
            _parsed(self._store.get(name)) if self._store.check([name]) else known
            for name, known in zip(names, self._known, strict=True)
        ]


def hostname() -> str:
    """Of this machine."""
    return socket.gethostname()


def _within(seconds: float, ask: Callable[[], Any]) -> Any:
    """What `ask` returns; None if it fails or takes longer."""
    answers: list[Any] = []

    def run() -> None:
        try:
            answers.append(ask())
        except Exception:  # whatever a store that is gone raises
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def _faults(word: bytes) -> tuple[int, list[Fault]]:
    """Which rank tells, and what."""
    rank, faults = json.loads(word)
    return int(rank), [Fault(**fault) for fault in faults]


def _parsed(beat: bytes) -> Beat:
    return Beat(*json.loads(beat))
