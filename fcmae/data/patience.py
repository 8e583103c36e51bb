"""Work over a network: repeated after a failure that may pass, and given up after a minute."""

import errno
import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from fcmae.errors import TransientError, UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

TRIES, FIRST_WAIT = 7, 1.0
"""About a minute: 1, 2, 4, ... 32 seconds between the tries."""
_GONE = (401, 403, 404, 410)  # HTTP's answers that another try does not change
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")  # of botocore, which need not be installed
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of a full disk here


def insist(
    what: str,
    attempt: Callable[[], T],
    *,
    tries: int = TRIES,
    first_wait: float = FIRST_WAIT,
    hopeless: tuple[type[Exception], ...] = (),
) -> T:
    """What `attempt` returns, tried again after each failure that may pass.

    Args:
        what: is fetched, for messages.
        attempt: fetches it.
        tries: how often.
        first_wait: seconds until the second try; doubled every time, and shortened or lengthened at random.
        hopeless: errors that another try does not mend.

    Raises:
        TransientError: every try failed.
        UserError: no other try can do better.
        OSError: the disk here is full.
    """
    for number in range(1, tries + 1):
        try:
            return attempt()
        except UserError:
            raise
        except Exception as error:  # each protocol has its own
            reason = _real(error)
            told = " ".join(f"{type(reason).__name__}: {reason}".split())
            if isinstance(reason, OSError) and reason.errno in _LOCAL:
                raise reason from error
            if is_gone(reason) or type(reason).__name__ in _NO_CREDENTIALS or isinstance(reason, hopeless):
                raise UserError(f"{what} cannot be read ({told}): check the address, the file, permissions") from error
            if number == tries:
                raise TransientError(
                    f"{what} could not be fetched in {number} tries, at last {told}: type the same again when its "
                    "server answers"
                ) from error
            # Of the system: many processes that fail together must not come back together.
            wait = first_wait * 2 ** (number - 1) * random.SystemRandom().uniform(0.5, 1.5)
            log.warning("%s: try %d of %d failed (%s), the next in %.1f s", what, number, tries, told, wait)
            time.sleep(wait)
    raise AssertionError(f"tries={tries}")


def is_gone(error: BaseException) -> bool:
    """Whether something is not there, or not for us."""
    return isinstance(error, FileNotFoundError | PermissionError) or getattr(error, "status", None) in _GONE


def _real(error: Exception) -> BaseException:
    """fsspec says that a file is not there whatever went wrong over HTTP; the cause knows better."""
    cause = error.__cause__
    over_http = cause is not None and type(cause).__module__.startswith("aiohttp")
    return cause if isinstance(error, FileNotFoundError) and cause is not None and over_http else error
