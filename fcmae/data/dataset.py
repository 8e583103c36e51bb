"""A source, a transform and a seed make a data set whose samples are functions of (seed, epoch, index)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fcmae.data.picture import Decoded, Guarded, Picture, PictureError
from fcmae.data.randomness import mix_seed
from fcmae.data.source import LEFT_OUT, Sample, Source
from fcmae.data.transforms import Transform
from fcmae.errors import TransientError, UserError


class ImageDataset(Dataset[list[Sample]]):
    """Some images of a source, transformed.

    Whatever is drawn for an image (its crop here, its mask later) is seeded from (seed, epoch, index, draw), so neither
    the worker that happens to read it nor a restart, nor another number of GPUs, changes it. A broken image is reported
    in the sample, and replaced by the next readable one or by an empty image that is to be left out.

    Args:
        source: where the images come from.
        indices: which of the source's images belong to this set.
        transform: picture -> (C, H, W).
        seed: of the random numbers; None: they follow from an image's name alone, the same in every epoch.
        labels: of all the source's images, as in `LabelledSource.labels`.
        stand_in: (C, H, W) uint8 in place of a broken image, whose label becomes `LEFT_OUT`; None to take the next
            readable one.
        repeats: samples from each decoded picture.

    Attributes:
        reading: told the name of every picture before it is opened.
    """

    max_broken_in_a_row = 100

    def __init__(
        self,
        *,
        source: Source,
        indices: Sequence[int],
        transform: Transform,
        seed: int | None,
        labels: Tensor | None = None,
        stand_in: Tensor | None = None,
        repeats: int = 1,
    ) -> None:
        self.source = source
        self.indices = indices
        self.transform = transform
        self.seed = seed
        self.labels = labels
        self.stand_in = stand_in
        self.repeats = repeats
        self.reading: Callable[[str], object] = _ignore

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, ...]) -> list[Sample]:
        """key = (epoch, position in `indices`), and a third number where a position may come more than once an epoch.

        Raises:
            UserError: a hundred images in a row cannot be read; a `TransientError` if it is for their file system.
        """
        epoch, position, *draw = key
        broken: list[tuple[str, str]] = []
        for candidate in range(position, position + min(len(self), self.max_broken_in_a_row)):
            index = self.indices[candidate % len(self)]
            try:
                return self._samples(index, (epoch, index, *draw), broken)
            except PictureError as error:
                broken.append((self.source.sample_id(index), str(error)))
                cause = error.__cause__  # the system's word, if it has an errno, not a decoder's
                away = getattr(cause, "errno", None) is not None and not isinstance(cause, PermissionError)
                if self.stand_in is not None:
                    label = self._label(index)
                    left_out = None if label is None else label.fill_(LEFT_OUT)
                    return [Sample(self.stand_in, broken[-1][0], 0, broken, left_out)]
        raise (TransientError if away else UserError)(
            f"{len(broken)} images in a row cannot be read, the last one {broken[-1][0]} ({broken[-1][1]}): "
            "check the files, or name another data.path"
        )

    def _samples(self, index: int, draw: tuple[int, ...], broken: list[tuple[str, str]]) -> list[Sample]:
        sample_id = self.source.sample_id(index)
        self.reading(sample_id)
        try:
            picture: Picture = Guarded(self.source.open(index))
        except UserError:  # not this picture's fault
            raise
        except Exception as error:
            raise PictureError(f"{type(error).__name__}: {error}") from error
        if self.repeats > 1:
            picture = Decoded(picture.decode())
        samples = []
        for repeat in range(self.repeats):
            drawn = draw if self.repeats == 1 else (*draw, repeat)
            seed = mix_seed(f"image {sample_id}") if self.seed is None else mix_seed("image", self.seed, *drawn)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every device that there might be
                image = self.transform(picture)
            samples.append(Sample(image, sample_id, seed >> 1, [] if repeat else broken, self._label(index)))
        return samples

    def _label(self, index: int) -> Tensor | None:
        if self.labels is None:
            return None
        return self.labels[index].to(torch.int64 if self.labels.ndim == 1 else torch.float32, copy=True)


def _ignore(sample_id: str) -> None:
    pass
