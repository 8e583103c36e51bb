"""Where messages go: the terminal or the job's log, and the run's `train.log`."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

_NOT_FOR_USERS = (
    r".*does not have many workers.*",
    r".*smaller than the logging interval.*",
    r".*dataloader is not resumable.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*Experiment logs directory .* exists.*",
    r".*Checkpoint directory .* exists.*",
    r".*lr_scheduler.step\(\).*optimizer.step\(\).*",
    r".*TF32.*",
    r".*It is recommended to use `self.log.*sync_dist=True.*",  # torchmetrics has done that
    r".*module\(s\) in eval mode at the start of training.*",  # a moving average is, and a frozen network
    r".*`srun` command is available.*",  # check_launch knows better when it is missing
    r"FSDP2-wrapped module .* returned a view tensor.*",  # the predictions, which nobody writes to
    r"Grad strides do not match bucket view strides.*",
)


class _RunLog(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        raise  # a full disk; logging would print a traceback for every line from here on


def open_console() -> Console:
    """The terminal, or whatever standard error leads to; Lightning's own chatter is kept off it."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return Console(stderr=True, highlight=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leaves out warnings that tell a user nothing."""
    with warnings.catch_warnings():
        for pattern in _NOT_FOR_USERS:
            warnings.filterwarnings("ignore", pattern)
        yield


@contextlib.contextmanager
def messages(console: Console, *, log_file: Path | None, silent: bool = False) -> Iterator[None]:
    """Shows the package's messages, and appends them to a file with the time.

    Args:
        console: shared with the progress bar, which it keeps whole.
        log_file: of the run; None to show them only.
        silent: show and write nothing, as all ranks but the first do.
    """
    log = logging.getLogger("fcmae")
    handlers: list[logging.Handler] = []
    if not silent:
        screen: logging.Handler = (
            RichHandler(console=console, show_time=False, show_level=False, show_path=False)
            if console.is_terminal
            else logging.StreamHandler(console.file)
        )
        screen.setFormatter(logging.Formatter("%(message)s"))
        handlers = [screen]
    if log_file is not None and not silent:
        file = _RunLog(log_file, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
    previous = log.level, log.propagate
    log.setLevel(logging.INFO if handlers else logging.ERROR)
    log.propagate = False
    for handler in handlers:
        log.addHandler(handler)
    try:
        with quiet():
            yield
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()
        log.setLevel(previous[0])
        log.propagate = previous[1]
