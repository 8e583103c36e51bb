"""Images in WebDataset shards, local or remote, with labels or without."""

import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcmae.data.decoding import open_picture
from fcmae.data.fetch_ahead import Fetch
from fcmae.data.picture import Picture
from fcmae.data.remote import RemoteCache, is_remote
from fcmae.data.shard_index import Shard, file_name
from fcmae.data.shard_list import ShardList, open_shard, open_tar
from fcmae.data.sharded import Places, ShardedDataModule
from fcmae.data.source import check_channels
from fcmae.data.tar_shard import TarShard
from fcmae.errors import UserError

_UNNAMED = 1000
"""So many classes need no names; more of them than samples are a mistake rather than classes."""

log = logging.getLogger(__name__)


class WebDataset:
    """The samples of some tar files, read by their place in them: in any order, as often as one likes.

    Each process opens the shards it needs, and keeps a few of them open. Remote ones are fetched whole, into a cache.

    Args:
        path: shards to learn from, see `ShardList`.
        val_path: shards to validate with; None if there are none of their own.
        in_chans: 1 for grey, 3 for RGB, any other number for what the files have.
        cache: of remote shards.
        most_open: shards that a process keeps open.
        read_labels: whether the images have labels, if their shards say so.

    Raises:
        UserError: no shard, one that is missing or twice there, an index that disagrees with its shards, or classes
            that do not fit.
    """

    def __init__(
        self,
        *,
        path: str | Sequence[str],
        val_path: str | Sequence[str] | None,
        in_chans: int,
        cache: RemoteCache,
        most_open: int,
        read_labels: bool = True,
    ) -> None:
        train = ShardList(path, option="data.path", cache=cache)
        held_out = ShardList(val_path, option="data.val_path", cache=cache) if val_path is not None else None
        shards = [*train.shards, *(held_out.shards if held_out else [])]
        self.shard_names = _names([shard.url for shard in shards])
        self.shard_sizes = [shard.samples for shard in shards]
        first = sum(shard.samples for shard in train.shards)
        self.held_out: range | None = range(first, sum(self.shard_sizes)) if held_out else None
        self._shards = [shard._replace(labels=None) for shard in shards]  # the workers need no second copy
        self._places = Places(self.shard_sizes)
        self._in_chans = in_chans
        self._cache = cache
        self._most_open = most_open
        self._open: OrderedDict[int, TarShard] = OrderedDict()
        self._opened_by = os.getpid()
        self.labels = _labels(shards, self.shard_names) if read_labels else None
        self.class_names = self._named_classes(self.labels, train, held_out) if self.labels is not None else []

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    @property
    def is_local(self) -> bool:
        """Whether no shard has to be fetched."""
        return not any(is_remote(shard.url) for shard in self._shards)

    def content(self) -> str:
        """Changes when the files do, although their names and sizes are the same."""
        versions = [
            shard.version if is_remote(shard.url) else Path(shard.url).stat().st_mtime_ns for shard in self._shards
        ]
        return repr(
            [(shard.size, shard.sha256, version) for shard, version in zip(self._shards, versions, strict=True)]
        )

    def sample_id(self, index: int) -> str:
        """`<shard>:<place in it, from 0>`."""
        shard, place = self._places[index]
        return f"{self.shard_names[shard]}:{place}"

    def open(self, index: int) -> Picture:
        """See `open_picture`.

        Raises:
            UserError: the shard cannot be read or fetched, or is not what its index says.
            Exception: the picture is broken.
        """
        shard, place = self._places[index]
        name, content = self._opened(shard).picture(place)
        return open_picture(content, name=name, in_chans=self._in_chans)

    def fetcher(self) -> Fetch | None:
        """See `ShardedSource`."""
        return None if self.is_local else self._fetch

    def _fetch(self, number: int) -> None:
        if is_remote(self._shards[number].url):
            open_shard(self._shards[number], replace(self._cache, tries=1)).close()

    def _opened(self, number: int) -> TarShard:
        if self._opened_by != os.getpid():  # a fork shares the place in its files with its parent
            self._open, self._opened_by = OrderedDict(), os.getpid()
        tar = self._open.pop(number, None) or self._open_anew(number)
        self._open[number] = tar
        if len(self._open) > self._most_open:
            self._open.popitem(last=False)[1].close()
        return tar

    def _named_classes(self, labels: Tensor, train: ShardList, held_out: ShardList | None) -> list[str]:
        """The names of the classes, where there are none their numbers."""
        names = train.class_names()
        others = held_out.class_names() if held_out else []
        if names and others and names != others:
            raise UserError("data.val_path names other classes than data.path: pack both with the same labels")
        names = names or others
        place = int(labels.argmax())
        largest = int(labels[place])
        if names and largest >= len(names):
            raise UserError(
                f"class {largest} of a sample has no name, the shards name {len(names)} classes: complete "
                "class_names.txt, or the index"
            )
        if not names and largest >= max(len(labels), _UNNAMED):
            raise UserError(
                f"class {largest} of sample {self.sample_id(place)} is more than there are samples: mend its .cls, "
                "name the classes in class_names.txt, or give data.read_labels=false"
            )
        return names or [str(number) for number in range(largest + 1)]

    def _open_anew(self, number: int) -> TarShard:
        return open_tar(self._shards[number], self._cache, lambda tar: self._check(tar, number))

    def _check(self, tar: TarShard, number: int) -> None:
        """Refuses samples that the index tells otherwise: a run learns the labels of the index."""
        shard = self._shards[number]
        if len(tar) != shard.samples:
            raise UserError(
                f"shard {shard.url} holds {len(tar)} samples, not {shard.samples} as its index says: fetch the shard "
                "again, or delete the index"
            )
        if self.labels is None:
            return
        first = sum(self.shard_sizes[:number])
        for place, known in enumerate(self.labels[first : first + shard.samples].tolist()):
            label = tar.label(place)
            if label not in (None, known):
                raise UserError(
                    f"sample {place} of shard {shard.url} is of class {label}, not {known} as it was indexed or "
                    "counted: write the index anew, or put the shard back; data.read_labels=false does without labels"
                )


@dataclass(kw_only=True, eq=False)
class WebDatasetDataModule(ShardedDataModule):
    """Images in WebDataset shards.

    Args:
        path: a brace pattern (`DIR/train-{000000..000123}.tar`), a folder of *.tar, or a list of such; paths or URLs.
        val_path: likewise, of the images to validate with; null to hold out the last ones of `path`.
        cache_dir: folder for remote shards and for what counting found; null for the user's cache folder.
        read_labels: false for images whose labels are wrong, or play no part: they have none then.
    """

    path: str | Sequence[str]
    val_path: str | Sequence[str] | None
    read_labels: bool

    def load_source(self) -> WebDataset:
        cache = self.cache()
        source = WebDataset(
            path=self.path,
            val_path=self.val_path,
            in_chans=self.in_chans,
            cache=cache,
            most_open=2 * self.mixed_shards,  # those mixed now, and those that other samples of a batch come from
            read_labels=self.read_labels,
        )
        if source.is_local:
            check_channels(source)  # other shards would be fetched
        else:
            cache.where()  # refused now if there is none, rather than in the midst of the run
        return source


def _names(urls: Sequence[str]) -> list[str]:
    """The file names of the shards; where two are the same, their paths from the folder that holds all."""
    if len(set(urls)) < len(urls):
        twice = next(url for number, url in enumerate(urls) if url in urls[:number])
        raise UserError(f"shard {twice} is named twice in data.path and data.val_path: name it once")
    names = [file_name(url) for url in urls]
    if len(set(names)) == len(names):
        return names
    parts = [url.split("/") for url in urls]
    common = next(depth for depth, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1)
    return ["/".join(part[common:]) for part in parts]


def _labels(shards: Sequence[Shard], names: Sequence[str]) -> Tensor | None:
    """(N,) int64; None unless every sample has a class."""
    if not any(shard.labels for shard in shards):
        return None
    for shard, name in zip(shards, names, strict=True):
        if shard.samples and (shard.labels is None or None in shard.labels):
            place = shard.labels.index(None) if shard.labels is not None else 0
            log.warning(
                "the labels are left out: %s:%d has no .cls with a number from 0 below 2^31, others have", name, place
            )
            return None
    return torch.tensor([label for shard in shards for label in shard.labels or []])
