"""Signals that ask a run to stop: noticed from the first moment of the process, obeyed where nothing is lost.

Standard library only: a run begins with this, before it imports torch, which takes seconds.
"""

import contextlib
import os
import signal
import sys
import threading
import time
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

    Before the training there is nothing to lose, and a signal ends the process at once. From `hold` on it is only
    noted; a second Ctrl-C ends the process all the same.

    Args:
        held: note signals only, from the beginning: by a process that another rank has started and will wait for.
        whole_process: is what the request is about, and not a call from somebody's program.

    Attributes:
        signum: the signal that asks for the stop; 0 for none.
        training: whether there is something to lose.
    """

    def __init__(self, *, held: bool = False, whole_process: bool = False) -> None:
        self.signum = 0
        self.training = False
        self._whole_process = whole_process
        self._held_before = self._held = held
        self._waiting = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        impatient = self.signum == signum == signal.SIGINT
        self.signum = self.signum or signum
        if impatient and self._whole_process:  # an exception would have Lightning clear up, which may take for ever
            print("fcmae: interrupted twice; the same command goes on from what is saved", file=sys.stderr, flush=True)  # noqa: T201
            os._exit(exit_code(signum))
        if impatient:
            raise KeyboardInterrupt
        if not self._held:
            _say_goodbye(signum)
            raise SystemExit(exit_code(signum))
        if self._waiting:
            self._waiting = False
            raise Woken

    def hold(self) -> None:
        """From here on signals are only noted: whoever trains asks, and ends where nothing is lost."""
        self._held = self.training = True

    def release(self) -> None:
        """The training is over, and what was asked is done: another run of the process, as in a sweep, begins anew."""
        self.signum, self.training, self._held = 0, False, self._held_before

    def unheard(self) -> bool:
        """Whether a signal that came would end the process, had the main thread noticed it."""
        return not self._held and not self.signum

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


def watch() -> None:
    """Takes the signals from here on, to the end of the process, which keeps the request in its table of handlers.

    Called before torch is imported, it also has torch's native code report errors only: its warning of a connection
    that is gone, as after a lost rank, is forty lines long, and hides who was lost.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    _take_signals(whole_process=True)
    request = signal.getsignal(signal.SIGTERM)
    if isinstance(request, StopRequest) and os.name == "posix":
        (_follow if _by_first_rank() else _listen)(request)


@contextlib.contextmanager
def watching() -> Iterator[StopRequest]:
    """Takes the signals, if that is not done yet, and gives them back in the end."""
    earlier = signal.getsignal(signal.SIGTERM)
    if isinstance(earlier, StopRequest):
        try:
            yield earlier
        finally:
            earlier.release()
        return
    previous = _take_signals()
    request = signal.getsignal(signal.SIGTERM)
    try:
        yield request if isinstance(request, StopRequest) else StopRequest()
    finally:
        for signum, handler in previous.items():
            if handler is not None:  # one that is not Python's cannot be given back
                signal.signal(signum, handler)


def _take_signals(*, whole_process: bool = False) -> dict[int, Any]:
    """Returns who had them before; in other threads than the main one, which cannot take signals, nothing happens."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    request = StopRequest(held=_by_first_rank(), whole_process=whole_process)
    return {signum: signal.signal(signum, request) for signum in _signums()}


def _by_first_rank() -> bool:
    """Whether Lightning's launcher has started this process, from the first rank."""
    return "LOCAL_RANK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ


def _signums() -> list[int]:
    names = ("SIGINT", "SIGTERM", "SIGUSR1")  # Windows has no SIGUSR1
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def _listen(request: StopRequest) -> None:
    """Ends the process for a signal that the main thread does not get to see for five seconds.

    Python runs handlers between two of its own instructions. While ranks connect, which may take until the last node is
    there, the main thread is inside of one.
    """
    told, teller = os.pipe()
    os.set_blocking(teller, False)
    signal.set_wakeup_fd(teller, warn_on_full_buffer=False)

    def listen() -> None:
        while True:
            signum = os.read(told, 1)[0]
            if signum not in _signums():  # a child that has ended
                continue
            time.sleep(5)
            if signal.getsignal(signum) is request and request.unheard():
                _say_goodbye(signum)
                os._exit(exit_code(signum))

    threading.Thread(target=listen, daemon=True, name="signals").start()


def _follow(request: StopRequest) -> None:
    """Ends the process when the first rank, which has started it, is gone before the training began."""
    first = os.getppid()

    def follow() -> None:
        while not request.training:
            time.sleep(1)
            if os.getppid() != first:
                os._exit(STOPPED)

    threading.Thread(target=follow, daemon=True, name="first-rank").start()


def _say_goodbye(signum: int) -> None:
    name = signal.Signals(signum).name
    print(f"fcmae: {name} before the training began; the same command starts it again", file=sys.stderr, flush=True)  # noqa: T201


class Gate(Protocol):
    """What a loader asks before it hands out a batch; a run may be stopped here."""

    def fetch(self, batches: Iterator[T]) -> T:
        """The next of `batches`."""


class OpenGate:
    """Nobody is asked: for what may be cut off at any moment."""

    def fetch(self, batches: Iterator[T]) -> T:
        """The next of `batches`."""
        return next(batches)
