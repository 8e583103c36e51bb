"""Images that lie together in shards: files of many samples, which are read best one file after another."""

import hashlib
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fcmae.data.fetch_ahead import Fetch, FetchAhead
from fcmae.data.labelled import LabelledDataModule
from fcmae.data.remote import RemoteCache
from fcmae.data.sampler import Forecast, Order, ShardOrder
from fcmae.data.source import LabelledSource
from fcmae.errors import UserError


class ShardedSource(LabelledSource, Protocol):
    """Images in shards, numbered shard after shard."""

    @property
    def shard_names(self) -> Sequence[str]:
        """Of the shards, as they are in a sample's id: `<shard>:<place in it, from 0>`."""
        ...

    @property
    def shard_sizes(self) -> Sequence[int]:
        """Samples in each."""
        ...

    def content(self) -> str:
        """Changes when the files do, although their names and sizes are the same."""
        ...

    def fetcher(self) -> Fetch | None:
        """Puts a shard on this machine, before anybody reads it; None if none has to be fetched."""
        ...


class Places:
    """Where a sample lies: from its number to a shard and the place in it.

    Args:
        sizes: samples in each shard.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(number of the shard, place in it)."""
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)


@dataclass(kw_only=True, eq=False)
class ShardedDataModule(LabelledDataModule):
    """Images in shards; with labels or without.

    A pass takes the shards in random order and mixes the samples of a few at a time, so that few files are in use at
    once. Held-out images are the source's own, or the last ones.

    Args:
        mixed_shards: number of shards whose samples are mixed with each other.
        cache_dir: folder for what lies on other machines; null for the user's cache folder.
        cache_gib: GiB that this may take there.
    """

    mixed_shards: int
    cache_dir: str | None
    cache_gib: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache_gib <= 0:
            raise UserError(f"data.cache_gib={self.cache_gib} must be above 0")
        if self.mixed_shards < 1:
            raise UserError(f"data.mixed_shards={self.mixed_shards} must be at least 1")

    @abstractmethod
    def load_source(self) -> ShardedSource:
        """Finds the shards.

        Raises:
            UserError: there are none, or they are not what they should be.
        """

    @property
    def sharded(self) -> ShardedSource:
        """The images and where they lie."""
        return self.source  # type: ignore[return-value]  # load_source gives nothing else

    def hold_out(self, count: int, held_out: int) -> tuple[Sequence[int], Sequence[int]]:
        """The last ones, so that the other shards need not be read to validate."""
        return range(count - held_out), range(count - held_out, count)

    def shards_of(self, indices: Sequence[int]) -> Tensor:
        """(N,) int64: the number of each sample's shard."""
        ends = torch.tensor(self.sharded.shard_sizes).cumsum(0)
        return torch.searchsorted(ends, torch.as_tensor(indices), right=True)

    def order(self, indices: Sequence[int]) -> Order:
        """Shard by shard, a few mixed at a time."""
        sizes = self.shards_of(indices).bincount()
        return ShardOrder(sizes[sizes > 0].tolist(), mixed=self.mixed_shards)

    def cache(self) -> RemoteCache:
        """Where shards of other machines are kept."""
        return RemoteCache(folder=Path(self.cache_dir).expanduser() if self.cache_dir else None, gib=self.cache_gib)

    def forecast(self, indices: Sequence[int]) -> Forecast | None:
        """Fetches the shards that are mixed next while the present ones are read."""
        fetch = self.sharded.fetcher()
        return fetch and FetchAhead(fetch, self.shards_of(indices), ahead=self.mixed_shards)

    def names_digest(self) -> str:
        """Of the shards and their sizes: to name every sample would take long."""
        listed = zip(self.sharded.shard_names, self.sharded.shard_sizes, strict=True)
        return hashlib.sha256(repr(list(listed)).encode()).hexdigest()
