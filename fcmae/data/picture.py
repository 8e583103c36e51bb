"""One picture on its way from a source to a transform: its size is known at once, its pixels when they are needed."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Pixels = Image.Image | Tensor
"""A PIL image, grey (L) or RGB with 8 bits per channel; or (C, H, W), uint8, or float32 as the file's values are meant:
integers of 16 bits as shares of their range, other numbers as they are."""


class Picture(Protocol):
    """What every source of images gives."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, as one is to see it."""
        ...

    def decode(self, at_least: tuple[int, int] = (0, 0)) -> Pixels:
        """The pixels, of the whole picture.

        Args:
            at_least: (height, width) that suffices, if it costs less to give a smaller picture of the same view;
                nothing smaller than that is given, unless the picture itself is. (0, 0): the whole size.

        Raises:
            Exception: whatever the decoder raises on a broken file; the data set skips and reports it.
        """
        ...


@dataclass(frozen=True)
class Decoded:
    """A picture whose pixels are there already."""

    pixels: Pixels

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        if isinstance(self.pixels, Tensor):
            return self.pixels.shape[1], self.pixels.shape[2]
        return self.pixels.height, self.pixels.width

    def decode(self, at_least: tuple[int, int] = (0, 0)) -> Pixels:
        """The pixels."""
        return self.pixels

    def crop(self, top: int, left: int, bottom: int, right: int) -> Tensor:
        """(C, bottom - top, right - left): a part of it."""
        if isinstance(self.pixels, Tensor):
            return self.pixels[:, top:bottom, left:right]
        return to_tensor(self.pixels.crop((left, top, right, bottom)))


class PictureError(Exception):
    """A picture whose file cannot be decoded; says why."""


@dataclass(frozen=True)
class Guarded:
    """A picture whose decoder's errors are told from anybody else's.

    Raises, from `decode`:
        PictureError: instead of whatever the decoder raises.
    """

    picture: Picture

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.picture.size

    def decode(self, at_least: tuple[int, int] = (0, 0)) -> Pixels:
        """The pixels."""
        try:
            return self.picture.decode(at_least)
        except Exception as error:  # decoders raise anything at a broken file
            raise PictureError(f"{type(error).__name__}: {error}") from error


def to_tensor(pixels: Pixels) -> Tensor:
    """(C, H, W), uint8 or float32."""
    if isinstance(pixels, Tensor):
        return pixels
    array = torch.from_numpy(np.array(pixels))  # (H, W) or (H, W, C)
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1)


def as_shares(pixels: Tensor) -> Tensor:
    """uint8 as shares of its range, in float32; floating-point values as they are."""
    return pixels.to(torch.float32) / 255 if pixels.dtype == torch.uint8 else pixels
