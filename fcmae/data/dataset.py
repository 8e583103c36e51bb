"""A source, a transform and a seed make a data set whose samples are functions of (seed, epoch, index)."""

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fcmae.data.source import Sample, Source
from fcmae.errors import UserError


class ImageDataset(Dataset[Sample]):
    """Some images of a source, transformed.

    The transform's random numbers are seeded from (seed, epoch, index), so neither the worker that happens to read a
    sample nor a restart changes it. A broken image is replaced by the next readable one and reported in the sample.

    Args:
        source: where the images come from.
        indices: which of the source's images belong to this set.
        transform: PIL image -> (C, H, W) uint8.
        seed: of the transform's random numbers.
    """

    max_broken_in_a_row = 100

    def __init__(
        self, *, source: Source, indices: Sequence[int], transform: Callable[[Image.Image], Tensor], seed: int
    ) -> None:
        self.source = source
        self.indices = indices
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """key = (epoch, position in `indices`).

        Raises:
            UserError: a hundred images in a row cannot be read.
        """
        epoch, position = key
        broken: list[tuple[str, str]] = []
        for candidate in range(position, position + min(len(self), self.max_broken_in_a_row)):
            index = self.indices[candidate % len(self)]
            sample_id = self.source.sample_id(index)
            try:
                image = self.source.load(index)
            except Exception as error:  # decoders raise anything at a broken file
                broken.append((sample_id, f"{type(error).__name__}: {error}"))
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(mix_seed("transform", self.seed, epoch, index))
                return Sample(self.transform(image), sample_id, broken)
        raise UserError(
            f"{len(broken)} images in a row cannot be read, the last one {broken[-1][0]} ({broken[-1][1]}): "
            "check the files, or name another data.path"
        )


def mix_seed(purpose: str, *numbers: int) -> int:
    """One well mixed 64-bit seed from what it is for and several small numbers, the same on every machine."""
    return int(np.random.SeedSequence([zlib.crc32(purpose.encode()), *numbers]).generate_state(1, np.uint64)[0])
