"""What entry points tell in one line: what a user can mend, what may pass by itself, and ranks that are lost."""


class UserError(ValueError):
    """Something the user gave, or the machine lacks, makes the work impossible.

    The message is one line that names the value, the bound and the fix. Entry points print it alone, without a
    traceback, and exit with code 2; whoever calls the package from Python catches it as a `ValueError`.
    """


class TransientError(UserError):
    """Something around the run has failed that may pass: a server, a file system, the machine's memory.

    Told like any other `UserError`, as the user may have to mend it after all; but the same command may well go on, so
    the exit code is 1, and a job tries it again.
    """


class RanksLostError(RuntimeError):
    """Other ranks of the run failed or no longer answer; the same command may well go on. Exit code 1."""


def in_a_line(error: BaseException) -> str:
    """What an error says, cut to its first line; its name if it says nothing."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    if lines[0].startswith("Caught ") and " in DataLoader worker process " in lines[0]:
        # With a worker's traceback around it, whose last line is `fcmae.errors.UserError: message`.
        return lines[-1].partition(": ")[2] or lines[-1]
    return lines[0]
