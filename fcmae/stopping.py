"""Signals that ask a run to stop: noticed from the first moment of the process, obeyed where nothing is lost.

Standard library only: a run begins with this, before it imports torch, which takes seconds.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Protocol, TypeVar

STOPPED = 75
"""The exit code of a run that was stopped, with all that it had done saved: EX_TEMPFAIL, run the same command again."""

T = TypeVar("T")


def exit_code(signum: int) -> int:
    """Of a run that a signal has stopped: 130 after Ctrl-C, as shells have it, else `STOPPED`."""
    return 130 if signum == signal.SIGINT else STOPPED


class Woken(BaseException):
    """A signal ended the waiting for something."""


class StopRequest:
    """Takes SIGINT, SIGTERM and SIGUSR1; schedulers announce with the last two that they want the machine back.

    Before the training there is nothing to lose, and a signal ends the process at once. While `held`, it is only noted;
    a second Ctrl-C ends the process all the same.

    Args:
        held: note signals only, from the beginning: by a process that another rank has started and will wait for.

    Attributes:
        signum: the signal that asks for the stop; 0 for none.
    """

    def __init__(self, *, held: bool = False) -> None:
        self.signum = 0
        self._held = held
        self._waiting = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        impatient = self.signum == signum == signal.SIGINT
        self.signum = self.signum or signum
        if impatient:
            raise KeyboardInterrupt
        if not self._held:
            name = signal.Signals(signum).name
            print(f"fcmae: {name} before the training began; the same command starts it again", file=sys.stderr)  # noqa: T201
            raise SystemExit(exit_code(signum))
        if self._waiting:
            self._waiting = False
            raise Woken

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Signals are only noted meanwhile."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def wait_for(self, batches: Iterator[T]) -> T:
        """The next batch, unless a signal ends the waiting for it.

        Raises:
            Woken: it did; the iterator is of no more use.
            StopIteration: there are no more batches.
        """
        self._waiting = True
        try:
            if self.signum:
                raise Woken
            return next(batches)
        finally:
            self._waiting = False


@contextlib.contextmanager
def watching() -> Iterator[StopRequest]:
    """Takes the signals, if that is not done yet, and gives them back in the end."""
    earlier = signal.getsignal(signal.SIGTERM)
    if isinstance(earlier, StopRequest):
        yield earlier
        return
    previous = watch()
    request = signal.getsignal(signal.SIGTERM)
    try:
        yield request if isinstance(request, StopRequest) else StopRequest()
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def watch() -> dict[int, Any]:
    """Takes the signals from here on; returns who had them before. The process's table of handlers keeps the request.

    Other threads than the main one cannot take signals: there, nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    by_first_rank = "LOCAL_RANK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ  # Lightning's launcher
    request = StopRequest(held=by_first_rank)
    names = ("SIGINT", "SIGTERM", "SIGUSR1")  # Windows has no SIGUSR1
    signums = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return {signum: signal.signal(signum, request) for signum in signums}


class Gate(Protocol):
    """What a loader asks before it hands out a batch; a run may be stopped here."""

    def fetch(self, batches: Iterator[T]) -> T:
        """The next of `batches`."""

    def agree(self) -> None:
        """Takes part in a decision of all ranks that this one needs no batch for."""


class OpenGate:
    """Nobody is asked: for what may be cut off at any moment."""

    def fetch(self, batches: Iterator[T]) -> T:
        """The next of `batches`."""
        return next(batches)

    def agree(self) -> None:
        """Nothing to decide."""
