"""Files of other machines: fetched with patience, and kept in a cache of bounded size."""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from filelock import FileLock

from fcmae.data.patience import FIRST_WAIT, TRIES, insist, is_gone
from fcmae.errors import UserError
from fcmae.files import user_cache

T = TypeVar("T")

_ABANDONED = 3600  # seconds without a byte, after which a half file is nobody's


def is_remote(url: str) -> bool:
    """Whether a path is a URL, which fsspec may know."""
    return "://" in url


def default_cache() -> Path:
    """Where remote shards are kept if nobody says.

    Raises:
        UserError: the user has no cache folder.
    """
    try:
        return user_cache() / "shards"
    except OSError as error:
        raise UserError(f"there is no folder to keep shards in ({error}): name one, data.cache_dir=DIR") from error


@dataclass(frozen=True, kw_only=True)
class RemoteCache:
    """Remote shards in a folder that all processes of this machine may share: whole files, and row groups of others.

    Args:
        folder: made when first needed; None for the user's own, which local shards can do without.
        gib: least recently used files are deleted as soon as all of them are larger than so many GiB. The newest is
            always kept, and so is, on POSIX, what a process has open.
        tries: see `insist`.
        first_wait: see `insist`.
    """

    folder: Path | None
    gib: float
    tries: int = TRIES
    first_wait: float = FIRST_WAIT

    def where(self) -> Path:
        """The folder.

        Raises:
            UserError: nobody named one, and the user has none.
        """
        return self.folder or default_cache()

    def open(self, url: str, *, version: str, size: int | None, sha256: str | None) -> BinaryIO:
        """The file, fetched unless it is there.

        Args:
            url: of the file.
            version: changes when its content does.
            size: in bytes, as its server or an index says; None if unknown.
            sha256: of its content, in hexadecimal; None if unknown.

        Raises:
            UserError: it cannot be fetched, or what comes is something else.
        """
        return self.keep(url, version=version, size=size, make=lambda part: self._fetch(url, part, size, sha256))

    def keep(self, name: str, *, version: str, make: Callable[[Path], object], size: int | None = None) -> BinaryIO:
        """A file of the cache, made unless it is there.

        Args:
            name: of its content: a URL, or whatever tells it from others.
            version: changes when its content does.
            make: writes the content to the path that it is given.
            size: in bytes; None if unknown.

        Raises:
            UserError: there is no room for it, or whatever `make` raises.
        """
        place = self._place(name, version)
        part = place.with_name(f".{place.name}.part")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with _lock(place):
                kept = _open_kept(place, size)
                if kept is not None:
                    return kept
                try:
                    make(part)
                except BaseException:
                    part.unlink(missing_ok=True)
                    raise
                file = part.open("rb")  # before others can see it and, short of space, delete it
                part.replace(place)
        except OSError as error:
            raise UserError(
                f"data.cache_dir={place.parent} cannot be used ({error.strerror or error}): free space there, or name "
                "another folder"
            ) from error
        self._shrink(keep=place, room=self.gib * 2**30 - os.fstat(file.fileno()).st_size)
        return file

    def discard(self, file: BinaryIO, name: str, *, version: str) -> None:
        """Closes a file that it gave and that is of no use, and deletes it unless another has taken its place."""
        place = self._place(name, version)
        with file, contextlib.suppress(OSError), _lock(place):
            same = os.path.samestat(os.fstat(file.fileno()), place.stat())
            file.close()  # Windows deletes nothing that is open
            if same:
                place.unlink()

    def read(self, url: str) -> bytes | None:
        """A small file, not cached; None if there is none.

        Raises:
            UserError: its server cannot be asked.
        """

        def attempt() -> bytes | None:
            try:
                system, path = _file_system(url)
                content: bytes = system.cat_file(path)
                return content
            except Exception as error:
                if is_gone(error):
                    return None
                raise

        return self.insist(url, attempt)

    def ask(self, url: str) -> tuple[int | None, str]:
        """(bytes, version) of a file, as its server says.

        Raises:
            UserError: there is none, or its server cannot be asked.
        """

        def attempt() -> dict[str, Any]:
            system, path = _file_system(url)
            info: dict[str, Any] = system.info(path)
            return info

        info = self.insist(url, attempt)
        marks = [str(info.get(key)) for key in ("ETag", "etag", "LastModified", "mtime", "size") if info.get(key)]
        return info.get("size"), " ".join(marks)

    def insist(self, what: str, attempt: Callable[[], T], *, hopeless: tuple[type[Exception], ...] = ()) -> T:
        """See `fcmae.data.patience.insist`."""
        return insist(what, attempt, tries=self.tries, first_wait=self.first_wait, hopeless=hopeless)

    def _place(self, name: str, version: str) -> Path:
        digest = hashlib.sha256(f"{name}\n{version}".encode()).hexdigest()[:32]
        return self.where() / f"shard-{digest}"

    def _fetch(self, url: str, part: Path, size: int | None, sha256: str | None) -> None:
        """Downloads a file. A server may cut or garble one now and then, but hardly twice alike to the byte.

        One that answers with nothing, or with a page of its own, does so alike, but knows of another size.
        """
        came: list[str] = []

        def attempt() -> None:
            system, path = _file_system(url)
            system.get_file(path, str(part))
            wrong = _difference(part, size, sha256)
            if wrong in came and part.stat().st_size in (size, system.info(path).get("size")):
                raise UserError(
                    f"{url} is not what its index, or else its server, said of it (twice {wrong}): write the index "
                    "anew, or put the shard back"
                )
            if wrong:
                came.append(wrong)
                raise ValueError(wrong)

        self.insist(url, attempt)

    def _shrink(self, keep: Path, room: float) -> None:
        """Deletes what was not used for longest, and the half files of processes that were killed."""
        for part in keep.parent.glob(".shard-*.part"):
            if time.time() - _modified(part) > _ABANDONED:
                part.unlink(missing_ok=True)
        files = sorted((path for path in keep.parent.glob("shard-*") if path != keep), key=_modified)
        for path in reversed(files):  # the newest first
            try:
                room -= path.stat().st_size
                if room < 0:
                    path.unlink()
            except FileNotFoundError:  # another process was faster
                continue
            except PermissionError:  # Windows, while it is open
                continue


def _open_kept(place: Path, size: int | None) -> BinaryIO | None:
    """A file of the cache, from now on the one used last; None if it is not there whole.

    Opened before anything is asked of it: another process may delete it at any moment, short of space.
    """
    try:
        file = place.open("rb")
    except FileNotFoundError:
        return None
    if size not in (None, os.fstat(file.fileno()).st_size):
        file.close()
        return None
    with contextlib.suppress(FileNotFoundError):  # on Windows, which knows no times of open files
        os.utime(file.fileno() if os.utime in os.supports_fd else place)
    return file


def _lock(place: Path) -> FileLock:
    """Held by whoever fetches or discards a file of the cache."""
    return FileLock(place.with_name(f".{place.name}.lock"))


def _difference(part: Path, size: int | None, sha256: str | None) -> str:
    """What is wrong with a file; empty if it is as it should be."""
    found = part.stat().st_size
    if size not in (None, found):
        return f"{found} bytes came, not {size}"
    digest = sha256 if sha256 is None else _sha256(part)
    return "" if digest == sha256 else f"its sha256 is {digest}, not {sha256}"


def _file_system(url: str) -> tuple[Any, str]:
    try:
        import fsspec

        options: dict[str, Any] = {}
        if url.startswith(("http://", "https://")):
            import aiohttp

            # By default a file that takes more than five minutes would fail, and proxies would be left out.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
        system, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise UserError(f"{url} needs pip install 'fcmae[remote]' ({error})") from error
    except ValueError as error:
        raise UserError(f"{url} cannot be read ({error}): use a path, https:// or s3://") from error
    return system, path


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # deleted by another process
        return time.time()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
