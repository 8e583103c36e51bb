"""What every source of images gives, and the samples and batches made from it."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

LEFT_OUT = -1
"""The label of an image that could not be read, where others must not stand in for it; filled with it if several."""


class Source(Protocol):
    """A fixed, ordered collection of images."""

    def __len__(self) -> int: ...

    def sample_id(self, index: int) -> str:
        """A stable name of the image, for messages: a path, or the like."""
        ...

    def load(self, index: int) -> Image.Image:
        """The decoded image, in the mode that fits the channels asked for.

        Raises:
            Exception: whatever the decoder raises on a broken file; the data set skips and reports it.
        """
        ...


class LabelledSource(Source, Protocol):
    """Images of known classes."""

    class_names: list[str]
    labels: Tensor
    """(N,) int64, the class of every image; or (N, classes) bool, where an image may have any number of them."""
    held_out: list[int] | None
    """The images that are there to validate with; None if the source makes no difference."""


class Sample(NamedTuple):
    """One image on its way to a batch."""

    image: Tensor
    """(C, H, W) uint8."""
    sample_id: str
    broken: list[tuple[str, str]]
    """(sample id, reason) of the images that were passed over to get this one."""
    label: Tensor | None = None
    """() int64, or (classes,) float32."""


class Batch(NamedTuple):
    """B images. From the workers they come as uint8; on the device they become normalised float32."""

    images: Tensor
    """(B, C, H, W)."""
    sample_ids: list[str]
    broken: list[tuple[str, str]]
    labels: Tensor | None = None
    """(B,) int64 or (B, classes) float32, where the source has labels."""


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one size to a batch."""
    labels = [sample.label for sample in samples if sample.label is not None]
    return Batch(
        images=torch.stack([sample.image for sample in samples]),
        sample_ids=[sample.sample_id for sample in samples],
        broken=[entry for sample in samples for entry in sample.broken],
        labels=torch.stack(labels) if labels else None,
    )
