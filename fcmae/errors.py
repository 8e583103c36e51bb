"""What entry points tell in one line: what a user can mend, and ranks that are lost."""


class UserError(ValueError):
    """Something the user gave, or the machine lacks, makes the work impossible.

    The message is one line that names the value, the bound and the fix. Entry points print it alone, without a
    traceback, and exit with code 2; whoever calls the package from Python catches it as a `ValueError`.
    """


class RanksLostError(RuntimeError):
    """Other ranks of the run no longer answer; the same command may well go on. Exit code 1."""
