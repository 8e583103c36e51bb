"""Files that are there whole or not at all, and what keeps us from them."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fcmae.errors import TransientError, UserError

_MAY_PASS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN)  # a file system that does not answer


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says in one line what keeps a block from writing `path`.

    Raises:
        UserError: the disk is full or the folder cannot be written.
        TransientError: its file system does not answer.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save puts its own before the file's
        if not isinstance(cause, OSError):
            raise
        if cause.errno in _MAY_PASS:
            raise TransientError(
                f"cannot write {path}: {cause.strerror}; see whether its disk or server is well"
            ) from error
        told = f"cannot write {path}: {cause.strerror or cause}; free space or mend permissions there"
        raise UserError(told) from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Tells a file system that keeps a block from reading `path` from what is not there, or damaged.

    Raises:
        TransientError: it does not answer, or does not let us read, as some do for a while when a ticket has run out.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (*_MAY_PASS, errno.EACCES, errno.EPERM):
            raise
        raise TransientError(
            f"cannot read {path}: {error.strerror}; see whether its disk or server is well, and whether you may read it"
        ) from error


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends well, and vanishes when it does not.

    Written beside its place, flushed to the disk (fsync), then renamed, so that a kill at any moment leaves either
    the earlier file or the new one.

    Raises:
        UserError: the disk is full or the folder cannot be written; whatever stood at `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # of a file system that fails; what it failed at is told already
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a small text file atomically, in UTF-8.

    Raises:
        UserError: it cannot be written.
    """
    with atomic_writer(path) as file:
        file.write(text.encode())


def expanded(place: Any) -> Any:
    """A path, or several, with the home folder for a `~` at its beginning; anything else as it is.

    Raises:
        UserError: nobody knows where that is.
    """
    if isinstance(place, list):
        return [expanded(one) for one in place]
    try:
        return str(Path(place).expanduser()) if isinstance(place, str) and place.startswith("~") else place
    except RuntimeError as error:
        raise UserError(f"{place}: nobody knows that home folder; write it out") from error


def exists(path: Path) -> bool:
    """Whether there is something at `path`. Python's own says no, since 3.14, when a file system does not answer.

    Raises:
        OSError: it does not, or does not let us look.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last of a name that nothing can have
        return False
    return True


def user_cache() -> Path:
    """The user's folder for what can be made again; others could put their own files in its place if they may write.

    Raises:
        OSError: there is none that is the user's alone.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = (root if root.is_absolute() else Path.home() / ".cache") / "fcmae"
    except RuntimeError as error:  # nobody knows where home is
        raise OSError(str(error)) from error
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if hasattr(os, "geteuid"):
        status = folder.stat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise OSError(f"{folder} is not yours alone to write")
    return folder


def sync_folder(folder: Path) -> None:
    """Makes a renaming in a folder durable, where the file system allows it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
