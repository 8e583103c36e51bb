"""What a picture costs on its way from a JPEG to a normalised batch, compared with the usual way, torchvision's.

All read the same pictures, draw their crops at random from the same shares of the area, and end with normalised float32
images in batches. The files are in the system's memory by then: no disk is measured. Beside them stands the least that
anybody pays who reads a whole JPEG with libjpeg.
"""

import itertools
import math
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import PIL
import torch
import torchvision
from PIL import Image
from rich.table import Table
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from fcmae.benchmark import measure
from fcmae.benchmark.conditions import Conditions, environment
from fcmae.benchmark.photographs import photographs, write_jpegs
from fcmae.benchmark.report import Report
from fcmae.benchmark.tables import _table
from fcmae.data.dataset import ImageDataset
from fcmae.data.imagefolder import ImageFolder
from fcmae.data.loader import Normalization, open_loader
from fcmae.data.remote import RemoteCache
from fcmae.data.sampler import EpochSampler
from fcmae.data.shard_folder import ShardFolder
from fcmae.data.shard_writer import ShardWriter, plan
from fcmae.data.source import LabelledSource
from fcmae.data.transforms import Crop
from fcmae.data.webdataset import WebDataset
from fcmae.errors import UserError

SIZES = ((500, 375), (2000, 1500))
"""(width, height) of the pictures: ImageNet's usual one, and a small photograph's."""
AT_LEAST = 64
"""Pictures of each size, rounded up to whole batches."""
SHORT_SIDE = 256
"""Of the pictures in shards, as `python -m fcmae.shard` has it."""
CROP_SCALE = (0.2, 1.0)
BASELINE = "torchvision"
FLOOR = "decoding at 1/8, no more"

Progress = Callable[[str, int], object]
"""Told that something of this name is done, and how often it will be in all."""


class Reader(Protocol):
    """One way to read some pictures.

    Attributes:
        normalizing: of each pass, the CPU seconds that normalising took; empty where it is no step of its own.
    """

    normalizing: list[float]

    def read(self) -> Iterator[Tensor]:
        """A pass over all of them, with new crops: normalised batches (B, 3, height, width)."""
        ...


class TorchvisionReader:
    """torchvision's `ImageFolder` and PIL, as the authors' code and most others have it.

    Args:
        folder: with a folder per class.
        size: (height, width) of the crops.
        batch_size: pictures per batch.
    """

    def __init__(self, folder: Path, size: tuple[int, int], batch_size: int) -> None:
        bicubic = transforms.InterpolationMode.BICUBIC
        transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=CROP_SCALE, interpolation=bicubic),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            ]
        )
        self.normalizing: list[float] = []
        self._loader: DataLoader[Any] = DataLoader(
            datasets.ImageFolder(folder, transform),
            batch_size=batch_size,
            shuffle=True,
            pin_memory=torch.cuda.is_available(),
        )

    def read(self) -> Iterator[Tensor]:
        for images, _ in self._loader:
            yield images


class OurReader:
    """What training does with a source, its normalisation included, which is the device's work there.

    Args:
        source: of the pictures.
        size: (height, width) of the crops.
        batch_size: pictures per batch.
    """

    def __init__(self, source: LabelledSource, size: tuple[int, int], batch_size: int) -> None:
        transform = Crop(crop_scale=CROP_SCALE, flip=True).train(size)
        dataset = ImageDataset(
            source=source, indices=range(len(source)), transform=transform, seed=0, labels=source.labels
        )
        self.normalizing: list[float] = []
        self._order = EpochSampler(size=len(source), batch_size=batch_size)
        self._loader = open_loader(dataset, self._order, batch_size=batch_size, num_workers=0)
        self._normalize = Normalization(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        self._epochs = itertools.count()

    def read(self) -> Iterator[Tensor]:
        self._order.set_epoch(next(self._epochs))
        self.normalizing.append(0)
        for batch in self._loader:
            start = time.process_time()
            images = self._normalize(batch.images)
            self.normalizing[-1] += time.process_time() - start
            yield images


class FloorReader:
    """Decodes every file at an eighth of its size, and does no more: next to nothing but the file's Huffman code.

    Args:
        folder: with a folder per class.
    """

    def __init__(self, folder: Path) -> None:
        self.normalizing: list[float] = []
        self._files = sorted(folder.glob("*/*.jpg"))

    def read(self) -> Iterator[Tensor]:
        """No batches."""
        for file in self._files:
            with Image.open(file) as picture:
                picture.draft(picture.mode, (picture.width // 8, picture.height // 8))
                picture.load()
        yield from ()


def run_pictures(
    conditions: Conditions,
    progress: Progress,
    *,
    quality: int,
    sizes: Sequence[tuple[int, int]] = SIZES,
    at_least: int = AT_LEAST,
) -> Report:
    """Writes pictures into a temporary folder and times how they are read: CPU time, whatever the conditions' clock.

    Args:
        conditions: batch and crop size, threads, repeats and warm-up: passes over all the pictures, in turn.
        progress: told what is done.
        quality: of the JPEGs, 1 to 100, in the folder and in the shards.
        sizes: (width, height) of the pictures.
        at_least: pictures of each size; rounded up to whole batches.

    Returns:
        Under `pictures`: `libraries` (their versions), `photographs` (names), `quality`, and under `sizes`, by
        `<width>x<height>`:
        `pictures` (number), `bytes` (mean of a file), and under `variants` by name: `seconds` (of every pass),
        `median_ms` and `quartiles_ms` (per picture), `per_second` (pictures), `speed` (by that of torchvision),
        `normalizing` (its share of the time; None where it is no step of its own).

    Raises:
        UserError: a quality out of its bounds.
    """
    if type(quality) is not int or not 1 <= quality <= 100:
        raise UserError(f"quality={quality!r} must be a whole number from 1 to 100, as JPEGs have it")
    count = math.ceil(at_least / conditions.batch_size) * conditions.batch_size
    found = {}
    for width, height in sizes:
        name = f"{width}x{height}"
        with tempfile.TemporaryDirectory(prefix="fcmae-pictures-") as folder, environment(conditions):
            jpegs = Path(folder, "jpegs")
            total = 0
            for file in write_jpegs(jpegs, (width, height), count, quality=quality, seed=conditions.seed):
                total += file.stat().st_size
                progress(f"writing {name}", count)
            ways = readers(jpegs, Path(folder, "shards"), conditions, quality=quality)
            variants = _measure(ways, name, count, conditions, progress)
        found[name] = {"pictures": count, "bytes": total / count, "variants": variants}
    libraries = {"torchvision": torchvision.__version__, "Pillow": PIL.__version__}
    names = sorted(photographs())
    return {"pictures": {"libraries": libraries, "photographs": names, "quality": quality, "sizes": found}}


def readers(jpegs: Path, shards: Path, conditions: Conditions, *, quality: int) -> dict[str, Reader]:
    """All ways to read a folder of classes, by name; the baseline first, the floor last.

    Args:
        jpegs: the folder.
        shards: is filled with the same pictures.
        conditions: crop and batch size.
        quality: of the JPEGs in the shards.
    """
    size, batch_size = conditions.image_size, conditions.batch_size
    source = ImageFolder(path=jpegs, in_chans=3)
    return {
        BASELINE: TorchvisionReader(jpegs, size, batch_size),
        "folder": OurReader(source, size, batch_size),
        f"shards, short side {SHORT_SIDE}": OurReader(_pack(source, shards, quality), size, batch_size),
        FLOOR: FloorReader(jpegs),
    }


def picture_tables(report: Report) -> Iterator[Table]:
    """A table for each size, if any was measured. The spread is the distance between the quartiles as a share of the
    median."""
    pictures = report.get("pictures", {"sizes": {}})
    for size, found in pictures["sizes"].items():
        heading = f"{found['pictures']} JPEGs of {size}, quality {pictures['quality']}, {found['bytes'] / 1e3:.0f} kB"
        result = _table([heading, "CPU ms", "spread", "speed", "normalising", "without", "per second"])
        versions = pictures["libraries"]
        result.caption = (
            f"per picture and core; speed / {BASELINE} {versions['torchvision']} (ImageFolder, RandomResizedCrop, ... "
            f"on PIL {versions['Pillow']}), and without the normalising, which a GPU does"
        )
        for name, row in found["variants"].items():
            low, high = row["quartiles_ms"]
            times = f"{row['median_ms']:.2f}", f"{(high - low) / row['median_ms']:.1%}", f"{row['speed']:.2f}"
            apart = (
                ("", "") if row["normalizing"] is None else (f"{row['normalizing']:.1%}", f"{row['speed_without']:.2f}")
            )
            result.add_row(name, *times, *apart, f"{row['per_second']:.0f}")
        yield result


def _measure(
    readers: Mapping[str, Reader], size: str, count: int, conditions: Conditions, progress: Progress
) -> dict[str, dict[str, Any]]:
    """The figures of each reader, by its name."""
    rounds = conditions.warmup + conditions.repeats
    times = measure.measure_times(
        {name: _whole_pass(reader) for name, reader in readers.items()},
        measure.process_clock,
        repeats=conditions.repeats,
        warmup=conditions.warmup,
        progress=lambda name: progress(f"{size}: {name}", rounds),
    )
    figures = {}
    for name, reader in readers.items():
        median = times[name].median or 1e-9
        normalizing = sum(reader.normalizing[conditions.warmup :]) / (sum(times[name].seconds) or 1e-9)
        figures[name] = {
            "seconds": list(times[name].seconds),
            "median_ms": median / count * 1e3,
            "quartiles_ms": [value / count * 1e3 for value in times[name].quartiles],
            "per_second": count / median,
            "speed": times[BASELINE].median / median,
            "normalizing": normalizing if reader.normalizing else None,
            "speed_without": times[BASELINE].median / (median * (1 - normalizing)),  # as on a GPU, which does that
        }
    return figures


def _whole_pass(reader: Reader) -> measure.Step:
    return lambda: deque(reader.read(), maxlen=0)


def _pack(source: ImageFolder, out: Path, quality: int) -> WebDataset:
    """The same pictures in a shard, as `python -m fcmae.shard` packs them."""
    folder = ShardFolder(out, {})
    (out / "train").mkdir()
    writer = ShardWriter(
        source=source,
        labels=source.labels,
        jobs=plan("train", range(len(source)), len(source), 0),
        out=out,
        quality=quality,
        short_side=SHORT_SIDE,
    )
    for packed in writer.write_all(0):
        folder.add(packed)
    folder.finish("train", source.class_names)
    cache = RemoteCache(folder=out / "cache", gib=1)
    return WebDataset(path=str(out / "train"), val_path=None, in_chans=3, cache=cache, most_open=1)
