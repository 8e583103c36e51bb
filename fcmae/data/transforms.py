"""From a decoded picture to a (C, H, W) uint8 tensor of the model's size."""

from collections.abc import Callable
from functools import partial

from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import pil_to_tensor

Transform = Callable[[Image.Image], Tensor]


def train_transform(size: tuple[int, int], crop_scale: tuple[float, float], flip: bool) -> Transform:
    """Random resized crop (bicubic) and horizontal flip, as in the published recipe (paper table 8).

    Args:
        size: (height, width) of the result in pixels.
        crop_scale: least and largest share of the picture's area that a crop may cover.
        flip: mirror every other picture.
    """
    height, width = size
    aspect = width / height
    return v2.Compose(
        [
            v2.RandomResizedCrop(
                size, scale=crop_scale, ratio=(3 / 4 * aspect, 4 / 3 * aspect), interpolation=InterpolationMode.BICUBIC
            ),
            v2.RandomHorizontalFlip(0.5 if flip else 0.0),
            v2.PILToTensor(),
        ]
    )


def eval_transform(size: tuple[int, int]) -> Transform:
    """The largest centred crop of the right aspect, resized (bicubic): the same for a picture every time.

    Args:
        size: (height, width) of the result in pixels.
    """
    return partial(_fit, size=size)


def _fit(image: Image.Image, size: tuple[int, int]) -> Tensor:
    return pil_to_tensor(ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC))
