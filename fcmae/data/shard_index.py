"""What is known of shards without opening them: `index.json` beside them, in the format of WebDataset's wids."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from fcmae.errors import UserError

INDEX = "index.json"
LABEL_LIMIT = 2**31
"""Classes are numbered below it; so many have never been, and tensors of labels hold them."""


class Shard(NamedTuple):
    """One file of samples."""

    url: str
    """Where it is: a path or a URL; in an index, its file name."""
    samples: int
    size: int | None = None
    """In bytes; None if unknown."""
    sha256: str | None = None
    labels: Sequence[int | None] | None = None
    """The class of every sample, None for one that has none; None if none has."""
    version: str = ""
    """Changes when its content does; of remote shards."""


class ShardIndex(NamedTuple):
    """All shards of a folder, by file name, and their classes."""

    shards: dict[str, Shard]
    class_names: list[str]
    """In the order of the labels; none if nobody named them."""


def write_index(shards: Sequence[Shard], class_names: Sequence[str]) -> str:
    """The text of an `index.json`; wids' own readers ignore what we add (sha256, labels, class_names)."""
    listed = [
        {
            "url": shard.url,
            "nsamples": shard.samples,
            "filesize": shard.size,
            "sha256": shard.sha256,
            "labels": shard.labels,
        }
        for shard in shards
    ]
    head = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "class_names": list(class_names)}
    return json.dumps({**head, "shardlist": listed}) + "\n"


def read_index(text: bytes, *, place: str) -> ShardIndex:
    """What an `index.json` says.

    Args:
        text: its content.
        place: where it is, for messages.

    Raises:
        UserError: it is no such index.
    """
    try:
        index = json.loads(text)
        if index["wids_version"] != 1:
            raise ValueError(f"wids_version {index['wids_version']} is not 1")
        shards = [_shard(entry) for entry in index["shardlist"]]
        class_names = [str(name) for name in index.get("class_names") or []]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{place} is no index of shards ({type(error).__name__}: {error}): delete it, or write it anew"
        ) from error
    return ShardIndex({shard.url: shard for shard in shards}, class_names)


def file_name(url: str) -> str:
    """The last part of a path or a URL."""
    path = url.partition("?")[0] if "://" in url else url
    return path.rstrip("/").rpartition("/")[2]


def _shard(entry: dict[str, Any]) -> Shard:
    name, samples, labels = file_name(str(entry["url"])), entry["nsamples"], entry.get("labels")
    size = entry.get("filesize")
    for key, value in (("nsamples", samples), ("filesize", 0 if size is None else size)):
        if not _is_whole(value):
            raise ValueError(f"{name} has {key} {value}, which is no whole number from 0")
    if labels is not None and (
        len(labels) != samples
        or not all(label is None or (_is_whole(label) and label < LABEL_LIMIT) for label in labels)
    ):
        raise ValueError(f"{name} has {samples} samples, and labels that are not as many whole numbers from 0")
    return Shard(name, samples, size, entry.get("sha256") or None, labels)


def _is_whole(value: object) -> bool:
    """Whether it is a whole number from 0; JSON's true is none."""
    return type(value) is int and value >= 0
