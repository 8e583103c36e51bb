"""Packs the images of any source into shards, one at a time: what a shard holds follows from its number alone."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F
from webdataset import TarWriter

from fcmae.data.loader import leave_signals_to_the_run, usable_cores
from fcmae.data.picture import Picture
from fcmae.data.randomness import mix_seed
from fcmae.data.shard_index import Shard
from fcmae.data.source import Source
from fcmae.data.watch import Reading
from fcmae.errors import UserError
from fcmae.files import atomic_writer


class ShardJob(NamedTuple):
    """A shard that is to be written."""

    file: str
    """Below the folder of all shards, with slashes."""
    first: int
    """Key of its first sample; the others count on."""
    indices: list[int]
    """Of the source's images, in their order."""


class Packed(NamedTuple):
    """A shard that was written."""

    file: str
    shard: Shard
    skipped: list[tuple[str, str]]
    """(sample id, reason) of images that could not be read."""


def plan(part: str, indices: Sequence[int], shard_size: int, seed: int) -> list[ShardJob]:
    """The shards of one part of the images: these in a random order, the same every time.

    Args:
        part: name of the part, and of its folder.
        indices: its images in the source.
        shard_size: images per shard; the last one may have fewer.
        seed: of the order.
    """
    generator = torch.Generator().manual_seed(mix_seed(f"shards {part}", seed))
    order = [indices[place] for place in torch.randperm(len(indices), generator=generator).tolist()]
    return [
        ShardJob(f"{part}/{part}-{first // shard_size:06d}.tar", first, order[first : first + shard_size])
        for first in range(0, len(order), shard_size)
    ]


class ShardWriter(Dataset[Packed]):
    """Writes the shard whose number is asked for; workers of a DataLoader write several at once.

    Args:
        source: of the images.
        labels: (N,) int64, of all the source's images; None for none.
        jobs: the shards.
        out: folder of all shards.
        quality: of the JPEGs, from 1 to 100.
        short_side: pixels to which pictures are shrunk (bicubic), where they are larger; None to keep their size.

    Attributes:
        reading: told the name of every picture before it is opened.
    """

    def __init__(
        self,
        *,
        source: Source,
        labels: Tensor | None,
        jobs: Sequence[ShardJob],
        out: Path,
        quality: int,
        short_side: int | None,
    ) -> None:
        self.source = source
        self.labels = labels
        self.jobs = jobs
        self.out = out
        self.quality = quality
        self.short_side = short_side
        self.reading: Callable[[str], object] = _ignore

    def __len__(self) -> int:
        return len(self.jobs)

    def write_all(self, num_workers: int | str) -> Iterator[Packed]:
        """Writes all shards in order, several at once.

        Args:
            num_workers: processes that write; 0 for this one; `auto`: as many as there are cores.

        Raises:
            UserError: as `__getitem__`; or one of the processes died.
        """
        workers = min(len(self), usable_cores() if num_workers == "auto" else int(num_workers))
        self.reading = reading = Reading(workers)
        loader = DataLoader(
            self,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            worker_init_fn=leave_signals_to_the_run,
        )
        written: Any = iter(loader)
        try:
            yield from written
        except (RuntimeError, OSError, EOFError) as error:  # the last two: a shard of a worker that is gone
            died = [number for number, worker in enumerate(getattr(written, "_workers", [])) if not worker.is_alive()]
            if not died:
                raise
            names = ", ".join(reading.name(number) or "nothing yet" for number in died)
            raise UserError(
                f"a process that packs died while it read {names}: the machine may be out of memory (type the same "
                "again with a smaller num_workers, it goes on), or the file crashes its decoder (leave it out)"
            ) from error

    def __getitem__(self, number: int) -> Packed:
        """Writes a shard.

        Raises:
            UserError: it cannot be written, or the source cannot go on.
        """
        job = self.jobs[number]
        place = self.out / job.file
        with atomic_writer(place) as file:
            hashed = _Hashed(file)
            # Closed after an error, too: left open, the tar would write to a closed file when it is forgotten.
            with TarWriter(hashed, encoder=False, mtime=0, user="", group="") as tar:
                labels, skipped = self._fill(tar, job)
        shard = Shard(
            url=place.name,
            samples=len(labels),
            size=hashed.size,
            sha256=hashed.digest.hexdigest(),
            labels=None if self.labels is None else labels,
        )
        return Packed(job.file, shard, skipped)

    def _fill(self, tar: TarWriter, job: ShardJob) -> tuple[list[int | None], list[tuple[str, str]]]:
        """(class of every sample, None if there are no classes; what could not be read)."""
        labels: list[int | None] = []
        skipped = []
        for key, index in enumerate(job.indices, start=job.first):
            sample_id = self.source.sample_id(index)
            self.reading(sample_id)
            try:
                extension, content = encode(self.source.open(index), self.quality, self.short_side)
            except UserError:
                raise
            except Exception as error:  # decoders raise anything at a broken file
                skipped.append((sample_id, f"{type(error).__name__}: {error}"))
                continue
            label = None if self.labels is None else int(self.labels[index])
            members = {extension: content, "json": json.dumps({"id": sample_id}).encode()}
            if label is not None:
                members["cls"] = str(label).encode()
            tar.write({"__key__": f"{key:09d}", **members})
            labels.append(label)
        return labels, skipped


def encode(picture: Picture, quality: int, short_side: int | None) -> tuple[str, bytes]:
    """(extension, content) of a picture's file: a JPEG; a NumPy array (H, W, C) where a JPEG would lose numbers.

    Args:
        picture: grey or RGB with 8 bits per channel for a JPEG; anything else keeps its pixels and its size.
        quality: of the JPEG.
        short_side: pixels to which it is shrunk, if it is larger; None to keep its size.
    """
    sides = picture.size
    scale = 1.0 if short_side is None else min(1.0, short_side / min(sides))
    height, width = (max(1, round(side * scale)) for side in sides)
    enough = (2 * height, 2 * width) if scale < 1 else (0, 0)  # resized from twice the size, it is as sharp
    pixels = picture.decode(enough)
    buffer = io.BytesIO()
    if isinstance(pixels, Tensor) and (pixels.dtype.is_floating_point or len(pixels) not in (1, 3)):
        array: np.ndarray[Any, Any] = pixels.permute(1, 2, 0).contiguous().numpy()
        np.save(buffer, array, allow_pickle=False)
        return "npy", buffer.getvalue()
    image: Image.Image = F.to_pil_image(pixels) if isinstance(pixels, Tensor) else pixels
    if scale < 1:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    image.save(buffer, "JPEG", quality=quality)
    return "jpg", buffer.getvalue()


def _ignore(sample_id: str) -> None:
    pass


def _as_it_is(packed: Any) -> Any:
    return packed


class _Hashed:
    """A file that is hashed while it is written, in order."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.size += len(content)
        return self._file.write(content)
