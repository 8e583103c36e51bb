"""From `data.path` to shards: their names, what an index says of them, or what counting finds."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import track
from webdataset.shardlists import expand_urls

from fcmae.data.remote import RemoteCache, is_remote
from fcmae.data.shard_index import INDEX, Shard, ShardIndex, file_name, read_index
from fcmae.data.tar_shard import TarShard
from fcmae.errors import TransientError, UserError
from fcmae.files import write_text

log = logging.getLogger(__name__)

_COUNTED_BY = 2
"""Another number for another way to tell what is in a shard: older notes are not asked then."""
_AT_ONCE = 8  # threads: each mostly waits for a disk or a server


class ShardList:
    """The shards that a user names, in order.

    Args:
        path: a brace pattern, a folder of *.tar (a remote one needs its index), or a list of such.
        option: that the user typed it as.
        cache: of remote shards, and of what counting found.

    Attributes:
        shards: with the number of samples in each, and their labels.

    Raises:
        UserError: no shard, one that is missing, or an index that disagrees with its shards.
    """

    def __init__(self, path: str | Sequence[str], *, option: str, cache: RemoteCache) -> None:
        self._path = path
        self._option = option
        self._cache = cache
        self._indexes: dict[str, ShardIndex | None] = {}
        urls = [url for entry in ([path] if isinstance(path, str) else path) for url in self._expand(str(entry))]
        if not urls:
            raise UserError(
                f"{option}={path} names no shard: name a folder of *.tar, or a pattern as x-{{000..123}}.tar"
            )
        self._urls = urls
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            known = list(threads.map(self._known, urls))
        unknown = [shard for shard, found in known if not found]
        counted = iter(self._counted(unknown))
        self.shards = [shard if found else next(counted) for shard, found in known]

    def class_names(self) -> list[str]:
        """In the order of the labels; none if nobody named them.

        Raises:
            UserError: two indexes name different ones, or the file that names them is no text.
        """
        indexes = [self._index_beside(url) for url in self._urls]
        names = [index.class_names for index in indexes if index and index.class_names]
        if any(others != names[0] for others in names):
            raise UserError(
                f"{self._option}={self._path}: the indexes beside the shards name different classes: write them anew"
            )
        return names[0] if names else self._listed_names(self._urls[0])

    def _expand(self, pattern: str) -> list[str]:
        try:
            found = expand_urls(pattern)
        except (ValueError, AssertionError) as error:
            raise UserError(
                f"{self._option}={pattern} is no pattern ({error}): write it as x-{{000..123}}.tar"
            ) from error
        return [url for place in found for url in self._shards_at(place)]

    def _shards_at(self, place: str) -> list[str]:
        """The shards of a folder, or the one that is meant."""
        if is_remote(place):
            if file_name(place).endswith(".tar"):
                return [place]
            folder = place.rstrip("/")
            index = self._index_beside(f"{folder}/x")
            if index is None:
                raise UserError(
                    f"{self._option}={place} holds no {INDEX}, and folders of other machines are not searched: name "
                    f"the shards as {folder}/x-{{000..123}}.tar"
                )
            return [f"{folder}/{name}" for name in index.shards]
        path = Path(place).expanduser()
        if path.is_dir():
            return self._shards_in(path)
        if not path.is_file():
            raise UserError(f"{self._option}: {place} does not exist: name a folder of *.tar, or shards that exist")
        return [str(path)]

    def _shards_in(self, folder: Path) -> list[str]:
        files = sorted(str(file) for file in folder.glob("*.tar") if not file.name.startswith("."))
        index = self._index_beside(f"{folder}/x")
        missing = sorted(index.shards.keys() - set(map(file_name, files))) if index else []
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of the shards that its {INDEX} lists, the first {missing[0]}: fetch "
                "them, or delete the index"
            )
        return files

    def _index_beside(self, url: str) -> ShardIndex | None:
        """The index in a shard's folder; it may be of other shards as well."""
        folder = url.rpartition("/")[0] or "."
        if folder not in self._indexes:
            place = f"{folder}/{INDEX}"
            text = self._read(place)
            self._indexes[folder] = None if text is None else read_index(text, place=place)
        return self._indexes[folder]

    def _read(self, place: str) -> bytes | None:
        if is_remote(place):
            return self._cache.read(place)
        try:
            return Path(place).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{place} cannot be read ({error.strerror}): mend that, or remove it") from error

    def _known(self, url: str) -> tuple[Shard, bool]:
        """What is known of a shard, and whether an index says so."""
        index = self._index_beside(url)
        shard = index.shards.get(file_name(url)) if index else None
        if is_remote(url):
            if shard:
                return shard._replace(url=url, version=shard.sha256 or str(shard.size)), True
            size, version = self._cache.ask(url)
            return Shard(url, 0, size, version=version), False
        status = os.stat(url)  # noqa: PTH116
        if shard and shard.size not in (None, status.st_size):
            raise UserError(
                f"shard {url} has {status.st_size} bytes, {INDEX} beside it says {shard.size}: fetch the shard again, "
                "or delete the index"
            )
        if shard:
            return shard._replace(url=url, size=status.st_size), True
        return Shard(url, 0, status.st_size, version=str(status.st_mtime_ns)), False

    def _counted(self, shards: Sequence[Shard]) -> list[Shard]:
        """Shards that no index tells of, with their samples and labels: counted once, then remembered."""
        if not shards:
            return []
        asked = json.dumps([_COUNTED_BY, *((shard.url, shard.size, shard.version) for shard in shards)])
        name = f"counts-{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"
        with contextlib.suppress(OSError, ValueError, TypeError):  # no folder is a ValueError, too
            counts = json.loads((self._cache.where() / name).read_text(encoding="utf-8"))
            return [shard._replace(samples=n, labels=labels) for shard, (n, labels) in zip(shards, counts, strict=True)]
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            jobs = threads.map(self._count, shards)
            counted = list(_shown(jobs, len(shards)))
        with contextlib.suppress(OSError, UserError):  # where nothing can be kept, they are counted again next time
            folder = self._cache.where()
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / name, json.dumps([(shard.samples, shard.labels) for shard in counted]))
        return counted

    def _count(self, shard: Shard) -> Shard:
        tar = open_tar(shard, self._cache)
        labels = [tar.label(place) for place in range(len(tar))]
        tar.close()
        return shard._replace(samples=len(tar), labels=labels if set(labels) - {None} else None)

    def _listed_names(self, url: str) -> list[str]:
        """The classes of `class_names.txt` beside a shard, one per line."""
        place = f"{url.rpartition('/')[0] or '.'}/class_names.txt"
        try:
            return (self._read(place) or b"").decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{place} is no text in UTF-8 ({error.reason} at byte {error.start}): save it so"
            ) from error


def open_shard(shard: Shard, cache: RemoteCache) -> BinaryIO:
    """The file of a shard, fetched if it is remote.

    Raises:
        UserError: it cannot be opened or fetched; a `TransientError` if that may pass.
    """
    if is_remote(shard.url):
        return cache.open(shard.url, version=shard.version, size=shard.size, sha256=shard.sha256)
    try:
        return Path(shard.url).open("rb")
    except OSError as error:
        kind = UserError if isinstance(error, PermissionError) else TransientError  # it was there a moment ago
        raise kind(f"shard {shard.url} cannot be opened: {error.strerror}; mend that, or name others") from error


def open_tar(shard: Shard, cache: RemoteCache, check: Callable[[TarShard], None] | None = None) -> TarShard:
    """The samples of a shard. What the cache kept and is refused is fetched once more: it may have come cut short.

    Args:
        shard: where it is.
        cache: of remote shards.
        check: raises a `UserError` if the samples are not those that they should be.

    Raises:
        UserError: it cannot be opened or fetched, is no tar, or is refused by `check`.
    """
    remote = is_remote(shard.url)
    for last in (False, True) if remote else (True,):
        file = open_shard(shard, cache)
        try:
            tar = TarShard(file, name=shard.url)
            if check is not None:
                check(tar)
            return tar
        except UserError as error:
            if remote:
                cache.discard(file, shard.url, version=shard.version)
            file.close()
            if last:
                raise
            log.warning("%s; it is fetched once more", error)
    raise AssertionError(shard.url)


def _shown(jobs: Iterable[Shard], count: int) -> Iterable[Shard]:
    """With a progress bar on standard error."""
    return track(jobs, "counting the samples of shards", total=count, console=Console(stderr=True), transient=True)
