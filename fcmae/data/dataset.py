"""A source, a transform and a seed make a data set whose samples are functions of (seed, epoch, index)."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fcmae.data.randomness import mix_seed
from fcmae.data.source import LEFT_OUT, Sample, Source
from fcmae.errors import UserError


class ImageDataset(Dataset[Sample]):
    """Some images of a source, transformed.

    The transform's random numbers are seeded from (seed, epoch, index, draw), so neither the worker that happens to
    read a sample nor a restart changes it. A broken image is reported in the sample, and replaced by the next readable
    one or by an empty image that is to be left out.

    Args:
        source: where the images come from.
        indices: which of the source's images belong to this set.
        transform: PIL image -> (C, H, W) uint8.
        seed: of the transform's random numbers.
        labels: of all the source's images, as in `LabelledSource.labels`.
        stand_in: (C, H, W) uint8 in place of a broken image, whose label becomes `LEFT_OUT`; None to take the next
            readable one.
    """

    max_broken_in_a_row = 100

    def __init__(
        self,
        *,
        source: Source,
        indices: Sequence[int],
        transform: Callable[[Image.Image], Tensor],
        seed: int,
        labels: Tensor | None = None,
        stand_in: Tensor | None = None,
    ) -> None:
        self.source = source
        self.indices = indices
        self.transform = transform
        self.seed = seed
        self.labels = labels
        self.stand_in = stand_in

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        """key = (epoch, position in `indices`), and a third number where a position may come more than once an epoch.

        Raises:
            UserError: a hundred images in a row cannot be read.
        """
        epoch, position, *draw = key
        broken: list[tuple[str, str]] = []
        for candidate in range(position, position + min(len(self), self.max_broken_in_a_row)):
            index = self.indices[candidate % len(self)]
            sample_id = self.source.sample_id(index)
            try:
                image = self.source.load(index)
            except Exception as error:  # decoders raise anything at a broken file
                broken.append((sample_id, f"{type(error).__name__}: {error}"))
                if self.stand_in is not None:
                    label = self._label(index)
                    return Sample(self.stand_in, sample_id, broken, None if label is None else label.fill_(LEFT_OUT))
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(mix_seed("transform", self.seed, epoch, index, *draw))
                return Sample(self.transform(image), sample_id, broken, self._label(index))
        raise UserError(
            f"{len(broken)} images in a row cannot be read, the last one {broken[-1][0]} ({broken[-1][1]}): "
            "check the files, or name another data.path"
        )

    def _label(self, index: int) -> Tensor | None:
        if self.labels is None:
            return None
        return self.labels[index].to(torch.int64 if self.labels.ndim == 1 else torch.float32, copy=True)
