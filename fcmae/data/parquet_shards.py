"""Images in Parquet files, on this machine or anywhere, which are read row group by row group."""

import hashlib
import logging
import mmap
import posixpath
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

from torch import Tensor

from fcmae.data.fetch_ahead import Fetch
from fcmae.data.hf_columns import Columns, encode_labels, stored_picture
from fcmae.data.patience import insist
from fcmae.data.picture import Picture
from fcmae.data.remote import RemoteCache, is_remote
from fcmae.data.sharded import Places
from fcmae.errors import UserError

_FILES_AT_ONCE = 16
T = TypeVar("T")

log = logging.getLogger(__name__)


class ParquetImages:
    """The images of Parquet files; every row group is a shard.

    Nothing but the files' metadata and their labels is read at first. Each process then keeps the images, not decoded,
    of the few row groups in use: those of this machine in its memory, those of others mapped from the cache.

    Args:
        files: of the split to learn from and, if there is one, of the split to validate with: paths or URLs.
        features: of the data set, by column.
        columns: to read.
        kept: number of row groups to keep.
        cache: of remote files' row groups.
        in_chans: 1 for grey, 3 for RGB, any other number for what the files have.

    Raises:
        UserError: a file cannot be read; as `encode_labels`.
    """

    def __init__(
        self,
        *,
        files: Mapping[str, Sequence[str]],
        features: Mapping[str, Any],
        columns: Columns,
        kept: int,
        cache: RemoteCache,
        in_chans: int,
    ) -> None:
        self.in_chans = in_chans
        self._column = columns.image
        self._kept = kept
        self._cache = cache
        self._in_use: OrderedDict[int, Any] = OrderedDict()
        urls = [url for split in files.values() for url in split]
        with ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
            read = list(threads.map(lambda url: _read_file(url, columns), urls))
        self._metadata = {url: metadata for url, (metadata, _) in zip(urls, read, strict=True)}
        self._versions = {url: _digest(metadata) for url, metadata in self._metadata.items()}
        self._shards = [shard for url, metadata in self._metadata.items() for shard in _row_groups(url, metadata)]
        names = dict(zip(urls, _below_their_folder(urls), strict=True))
        self.shard_names = [f"{names[url]}#{number}" for url, number, _ in self._shards]
        self.shard_sizes = [rows for _, _, rows in self._shards]
        self._places = Places(self.shard_sizes)
        self.held_out: Sequence[int] | None = None
        if len(files) > 1:
            learned_from = next(iter(files.values()))
            self.held_out = range(sum(self._metadata[url].num_rows for url in learned_from), len(self))
        self.class_names: list[str] = []
        self.labels: Tensor | None = None
        if columns.label is not None:
            parts = [labels for _, labels in read]
            self.class_names, self.labels = encode_labels(parts, features[columns.label], name=columns.label)

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_in_use": OrderedDict()}  # every process reads its own

    def content(self) -> str:
        """Changes when the files do, as far as their footers tell."""
        return repr([*self._versions.values()])

    def fetcher(self) -> Fetch | None:
        """See `ShardedSource`."""
        return self._fetch if any(map(is_remote, self._metadata)) else None

    def sample_id(self, index: int) -> str:
        """`<file>#<row group>:<row>`, the file as a path below the folder that holds all of them."""
        shard, row = self._places[index]
        return f"{self.shard_names[shard]}:{row}"

    def open(self, index: int) -> Picture:
        """See `stored_picture`.

        Raises:
            UserError: the row group cannot be read.
        """
        shard, row = self._places[index]
        if shard not in self._in_use:
            while len(self._in_use) >= self._kept:
                self._in_use.popitem(last=False)
            group = self._shards[shard]
            self._in_use[shard] = self._mapped(group) if is_remote(group.url) else self._read(group, insist)
        self._in_use.move_to_end(shard)
        return stored_picture(self._in_use[shard][row].as_py(), in_chans=self.in_chans)

    def _fetch(self, number: int) -> None:
        if is_remote(self._shards[number].url):
            self._fetched(self._shards[number], replace(self._cache, tries=1)).close()

    def _mapped(self, group: "RowGroup") -> Any:
        """A `pyarrow.ChunkedArray`, of a file in the cache; one that was cut short there is fetched once more."""
        for last in (False, True):
            with self._fetched(group, self._cache) as file:
                try:
                    return _open_arrow(file)[self._column]
                except ValueError as error:
                    self._cache.discard(file, self._name(group), version=self._versions[group.url])
                    if last:
                        raise
                    log.warning("%s in the cache is no whole file (%s); it is fetched once more", group.name, error)
        raise AssertionError(group)

    def _fetched(self, group: "RowGroup", cache: RemoteCache) -> BinaryIO:
        def make(part: Path) -> None:
            _write_arrow(part, self._column, self._read(group, cache.insist))

        return cache.keep(self._name(group), version=self._versions[group.url], make=make)

    def _name(self, group: "RowGroup") -> str:
        return f"{group.url}#{group.number}:{self._column}"

    def _read(self, group: "RowGroup", patience: "Patience") -> Any:
        """A `pyarrow.ChunkedArray`."""

        def read(parquet: Any) -> Any:
            return parquet.read_row_group(group.number, columns=[self._column], use_threads=False)[self._column]

        return _patiently(lambda: _in_file(group.url, read, self._metadata[group.url]), group.url, group.name, patience)


class Patience(Protocol):
    """As `insist` of `fcmae.data.patience`, and as a cache's."""

    def __call__(self, what: str, attempt: Callable[[], T], *, hopeless: tuple[type[Exception], ...]) -> T: ...


class RowGroup(NamedTuple):
    """Some rows of a Parquet file, which lie together."""

    url: str
    number: int
    rows: int

    @property
    def name(self) -> str:
        """For messages."""
        return f"row group {self.number} of {self.url}"


def read_schema(url: str) -> Any:
    """The `pyarrow.Schema` of a file.

    Raises:
        UserError: it cannot be read.
    """
    return _patiently(lambda: _in_file(url, lambda parquet: parquet.schema_arrow), url, url)


def _below_their_folder(urls: Sequence[str]) -> list[str]:
    """The paths below the folder that holds them all: the same wherever that lies."""
    paths = [url.rpartition("://")[2] for url in urls]
    folder = posixpath.commonpath([posixpath.dirname(path) for path in paths])
    return [posixpath.relpath(path, folder) for path in paths]


def _row_groups(url: str, metadata: Any) -> list[RowGroup]:
    groups = [RowGroup(url, number, metadata.row_group(number).num_rows) for number in range(metadata.num_row_groups)]
    return [group for group in groups if group.rows]


def _read_file(url: str, columns: Columns) -> tuple[Any, Any]:
    """(metadata, labels or None)."""

    def read(parquet: Any) -> tuple[Any, Any]:
        for column in columns:
            if column is not None and column not in parquet.schema_arrow.names:
                raise UserError(f"{url} has no column {column!r}, only {', '.join(parquet.schema_arrow.names)}")
        if columns.label is None:
            return parquet.metadata, None
        return parquet.metadata, parquet.read(columns=[columns.label], use_threads=False)[columns.label]

    return _patiently(lambda: _in_file(url, read), url, url)


def _in_file(url: str, read: Callable[[Any], T], metadata: Any = None) -> T:
    """Opens a file for a moment: nothing stays open that a new process could inherit."""
    import fsspec
    import pyarrow.parquet as pq

    files, path = fsspec.core.url_to_fs(url)
    # A column of a row group is asked for as a whole (pre_buffer), and no more than it (cache_type).
    with files.open(path, "rb", cache_type="none") as file:
        return read(pq.ParquetFile(file, metadata=metadata, pre_buffer=True))


def _patiently(read: Callable[[], T], url: str, what: str, patience: "Patience" = insist) -> T:
    """Repeats a read that fails, if it goes over a network."""
    import pyarrow as pa

    return patience(what, read, hopeless=(pa.ArrowInvalid,) if is_remote(url) else (Exception,))


def _digest(metadata: Any) -> str:
    return hashlib.sha256(str(metadata.to_dict()).encode()).hexdigest()[:32]


def _write_arrow(path: Path, name: str, column: Any) -> None:
    """Writes a column such that it can be mapped into memory."""
    import pyarrow as pa

    table = pa.table({name: column})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as written:
        written.write_table(table)


def _open_arrow(file: BinaryIO) -> Any:
    """A `pyarrow.Table` in a file's pages, which all processes share; the file may be closed, and deleted, then.

    Raises:
        ValueError: it is none, or not whole.
    """
    import pyarrow as pa

    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped))).read_all()
