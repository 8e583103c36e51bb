"""What every source of images gives, and the samples and batches made from it."""

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fcmae.data.decoding import ChannelsError
from fcmae.data.picture import Picture, as_shares
from fcmae.errors import UserError

LEFT_OUT = -1
"""The label of an image that could not be read, where others must not stand in for it; filled with it if several."""


class Source(Protocol):
    """A fixed, ordered collection of images."""

    def __len__(self) -> int: ...

    def sample_id(self, index: int) -> str:
        """A stable name of the image, for messages: a path, or the like."""
        ...

    def open(self, index: int) -> Picture:
        """The picture, with the channels asked for.

        Raises:
            Exception: whatever the decoder raises on a broken file; the data set skips and reports it.
        """
        ...


class LabelledSource(Source, Protocol):
    """Images of known classes, or of none."""

    @property
    def class_names(self) -> list[str]:
        """In the order of the labels."""
        ...

    @property
    def labels(self) -> Tensor | None:
        """(N,) int64, the class of every image; or (N, classes) bool, where an image may have any number of them; None
        if they have no labels."""
        ...

    @property
    def held_out(self) -> Sequence[int] | None:
        """The images that are there to validate with; None if the source makes no difference."""
        ...


class Sample(NamedTuple):
    """One image on its way to a batch."""

    image: Tensor
    """(C, H, W), uint8; or float32, see `fcmae.data.picture.Pixels`."""
    sample_id: str
    seed: int
    """In [0, 2^63): of whatever is drawn for this image alone later on, such as its mask."""
    broken: list[tuple[str, str]]
    """(sample id, reason) of the images that were passed over to get this one."""
    label: Tensor | None = None
    """() int64, or (classes,) float32."""


class Batch(NamedTuple):
    """B images. From the workers they come as their pixels are; on the device they become normalised float32."""

    images: Tensor
    """(B, C, H, W)."""
    sample_ids: list[str]
    seeds: Tensor
    """(B,) int64."""
    broken: list[tuple[str, str]]
    labels: Tensor | None = None
    """(B,) int64 or (B, classes) float32, where the source has labels."""
    surplus: bool = False
    """Counts for nothing: the images are repeated, so that all ranks validate with equally many batches."""


def spelled_plainly(class_name: str) -> str:
    """A class that is a whole number, without the `.0` that pandas appends where cells of its column are empty."""
    found = re.fullmatch(r"([+-]?\d+)\.0+", class_name)
    return found[1] if found else class_name


def check_channels(source: Source) -> None:
    """Refuses a number of channels that the first readable picture has not, before any training.

    Raises:
        UserError: says how many it has; or the source cannot be read at all.
    """
    for index in range(min(len(source), 100)):
        try:
            source.open(index)
        except ChannelsError as error:
            raise UserError(
                f"{source.sample_id(index)} has {error}: set data.in_chans, data.mean and data.std to the files'"
            ) from error
        except UserError:
            raise
        except Exception:  # decoders raise anything at a broken file, which is reported when it is read
            continue
        else:
            return


def collate(drawn: Sequence[Sequence[Sample]]) -> Batch:
    """Samples of one size, as many as each picture gave, to a batch."""
    samples = [sample for several in drawn for sample in several]
    images = [sample.image for sample in samples]
    if len({image.dtype for image in images}) > 1:  # files with 8 bits beside files with more
        images = [as_shares(image) for image in images]
    labels = [sample.label for sample in samples if sample.label is not None]
    return Batch(
        images=_stack(images),
        sample_ids=[sample.sample_id for sample in samples],
        seeds=torch.tensor([sample.seed for sample in samples]),
        broken=[entry for sample in samples for entry in sample.broken],
        labels=torch.stack(labels) if labels else None,
    )


def _stack(images: Sequence[Tensor]) -> Tensor:
    """(B, C, H, W), in channels-last memory where the pictures are, which spares the rearranging."""
    if images[0].stride(0) > 1:
        return torch.stack([*images])
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
