"""From a picture to a (C, H, W) tensor of the model's size."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fcmae.data.picture import Decoded, Picture, to_tensor
from fcmae.errors import UserError

_TRIES = 10  # to find a box that fits into the picture

Transform = Callable[[Picture], Tensor]
"""Picture -> (C, height, width), uint8 or float32 as its pixels are."""


class Augment(Protocol):
    """What becomes of a picture: at random to train with, the same every time to validate with."""

    def train(self, size: tuple[int, int]) -> Transform:
        """For pictures to learn from, size = (height, width) in pixels."""
        ...

    def evaluate(self, size: tuple[int, int]) -> Transform:
        """For pictures to validate with."""
        ...


@dataclass(frozen=True, kw_only=True)
class Crop:
    """Random resized crop (bicubic) and horizontal flip, as in the published pre-training recipe (paper table 8).

    Args:
        crop_scale: least and largest share of the picture's area that a crop may cover.
        flip: mirror every other picture.

    Raises:
        UserError: shares out of (0, 1], or falling.
    """

    crop_scale: Sequence[float]
    flip: bool

    def __post_init__(self) -> None:
        check_crop_scale(self.crop_scale)

    def train(self, size: tuple[int, int]) -> Transform:
        """A random part of the picture."""
        return RandomCrop(size, self.crop_scale, self.flip)

    def evaluate(self, size: tuple[int, int]) -> Transform:
        """The largest centred crop of the right aspect, resized (bicubic)."""
        return partial(_fit, size=size)


class RandomCrop:
    """A random part of a picture, resized (bicubic), perhaps mirrored; no more of a JPEG is decoded than that needs.

    Draws from torch's global generator.

    Args:
        size: (height, width) of the result in pixels.
        crop_scale: least and largest share of the picture's area; the aspect is within a third of the result's.
        flip: mirror every other picture.
    """

    def __init__(self, size: tuple[int, int], crop_scale: Sequence[float], flip: bool) -> None:
        self.size = size
        self.crop_scale = [crop_scale[0], crop_scale[1]]
        self.flip = flip

    def __call__(self, picture: Picture) -> Tensor:
        """Picture -> (C, height, width)."""
        height, width = picture.size
        coin, *numbers = torch.rand(1 + 4 * _TRIES).tolist()
        box = _draw_box(height, width, self.crop_scale, self.size[1] / self.size[0], numbers)
        mirrored = self.flip and coin < 0.5
        enough = math.ceil(height * self.size[0] / box[2]), math.ceil(width * self.size[1] / box[3])
        decoded = Decoded(picture.decode(enough))
        part = decoded.crop(*_scaled(box, height, width, decoded.size))
        cropped = F.resize(part, list(self.size), InterpolationMode.BICUBIC, antialias=True)
        return cropped.flip(2) if mirrored else cropped


def _draw_box(
    height: int, width: int, scale: Sequence[float], aspect: float, numbers: Sequence[float]
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop, as torchvision's RandomResizedCrop draws it, with a tenth of the overhead.

    Args:
        height: of the picture.
        width: of the picture.
        scale: least and largest share of its area.
        aspect: of width to height; the crop's is within a third of it, evenly on a logarithmic scale.
        numbers: 4 for each try, random in [0, 1).
    """
    for place in range(0, len(numbers), 4):
        share, stretch, down, across = numbers[place : place + 4]
        area = height * width * (scale[0] + share * (scale[1] - scale[0]))
        ratio = aspect * 3 / 4 * (16 / 9) ** stretch
        tall, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < tall <= height and 0 < wide <= width:
            return int(down * (height - tall + 1)), int(across * (width - wide + 1)), tall, wide
    tall = min(height, max(1, round(width / (aspect * 3 / 4))))  # the largest in the middle
    wide = min(width, max(1, round(height * aspect * 4 / 3)))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def _scaled(box: Sequence[int], height: int, width: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) in pixels of a picture that was decoded smaller, of a box in it at its whole size."""
    top, left, tall, wide = box
    down, across = size[0] / height, size[1] / width
    bottom, right = round((top + tall) * down), round((left + wide) * across)
    return min(round(top * down), bottom - 1), min(round(left * across), right - 1), bottom, right


def check_crop_scale(crop_scale: Sequence[float]) -> None:
    """Refuses what are no two rising shares.

    Raises:
        UserError: says so.
    """
    if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise UserError(f"augment.crop_scale={list(crop_scale)} must be two rising shares in (0, 1], as [0.2, 1]")


def _fit(picture: Picture, size: tuple[int, int]) -> Tensor:
    pixels = picture.decode()
    if isinstance(pixels, Image.Image):
        return to_tensor(ImageOps.fit(pixels, (size[1], size[0]), Image.Resampling.BICUBIC))
    scale = min(pixels.shape[1] / size[0], pixels.shape[2] / size[1])
    part = F.center_crop(pixels, [max(1, round(side * scale)) for side in size])
    return F.resize(part, list(size), InterpolationMode.BICUBIC, antialias=True)
