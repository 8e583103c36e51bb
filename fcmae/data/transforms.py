"""From a decoded picture to a (C, H, W) uint8 tensor of the model's size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import pil_to_tensor

from fcmae.errors import UserError

Transform = Callable[[Image.Image], Tensor]


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
        return v2.Compose([random_crop(size, self.crop_scale, self.flip), v2.PILToTensor()])

    def evaluate(self, size: tuple[int, int]) -> Transform:
        """The largest centred crop of the right aspect, resized (bicubic)."""
        return partial(_fit, size=size)


def random_crop(size: tuple[int, int], crop_scale: Sequence[float], flip: bool) -> v2.Compose:
    """Random resized crop (bicubic), within a third of the result's aspect, and horizontal flip."""
    aspect = size[1] / size[0]
    crop = v2.RandomResizedCrop(
        size,
        scale=(crop_scale[0], crop_scale[1]),
        ratio=(3 / 4 * aspect, 4 / 3 * aspect),
        interpolation=InterpolationMode.BICUBIC,
    )
    return v2.Compose([crop, v2.RandomHorizontalFlip(0.5 if flip else 0.0)])


def check_crop_scale(crop_scale: Sequence[float]) -> None:
    """Refuses what are no two rising shares.

    Raises:
        UserError: says so.
    """
    if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise UserError(f"augment.crop_scale={list(crop_scale)} must be two rising shares in (0, 1], as [0.2, 1]")


def _fit(image: Image.Image, size: tuple[int, int]) -> Tensor:
    return pil_to_tensor(ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC))
