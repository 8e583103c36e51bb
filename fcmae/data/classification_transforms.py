"""Pictures for classification, as the published fine-tuning recipes treat them (original code; timm)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from fcmae.data.picture import Picture, Pixels, to_tensor
from fcmae.data.randomness import seeded
from fcmae.data.transforms import RandomCrop, Transform, check_crop_scale
from fcmae.errors import UserError

WARP_FROM = 384
"""Pixels from which on pictures are evaluated whole, warped to the model's shape, and not cropped (original code)."""

_STRIP = 256
"""Times the crop's side, beyond which a resized picture would be nothing but memory."""


@dataclass(frozen=True, kw_only=True)
class ClassificationAugment:
    """Random crop and flip, then RandAugment, or colour jitter instead; to evaluate, by the published rule.

    Args:
        crop_scale: least and largest share of the picture's area that a crop may cover.
        flip: mirror every other picture.
        randaugment: timm's description of a policy, such as `rand-m9-mstd0.5-inc1`; None for none.
        color_jitter: strength of the changes of brightness, contrast and saturation; as in timm only without
            RandAugment, and on pictures with three channels.
        mean: per channel, of pixels in [0, 1]: fills what a rotation or a shift uncovers; `auto`: see the data module.
        crop_pct: to evaluate, the side of the centred crop as a share of the resized picture's short side; `auto`:
            0.875 below 384 px; from there on the whole picture, warped.

    Raises:
        UserError: a value out of its bounds, or a policy that timm does not know.
    """

    crop_scale: Sequence[float]
    flip: bool
    randaugment: str | None
    color_jitter: float
    mean: Sequence[float] | Literal["auto"]
    crop_pct: float | str

    def __post_init__(self) -> None:
        check_crop_scale(self.crop_scale)
        if self.color_jitter < 0:
            raise UserError(f"augment.color_jitter={self.color_jitter} must be a number from 0")
        check_crop_pct(self.crop_pct)
        if self.randaugment is not None and len(self.mean) not in (1, 3):
            raise UserError(
                f"augment.randaugment={self.randaugment} works on 1 or 3 channels, not {len(self.mean)}: "
                "set augment.randaugment=null"
            )
        self._policy(224)

    def train(self, size: tuple[int, int]) -> Transform:
        """A random part of the picture, changed in colours and geometry."""
        crop = RandomCrop(size, self.crop_scale, self.flip)
        policy = self._policy(min(size))
        if policy is not None:
            return v2.Compose([crop, _Seeded(policy)])
        if self.color_jitter and len(self.mean) == 3:
            return v2.Compose([crop, v2.ColorJitter(self.color_jitter, self.color_jitter, self.color_jitter)])
        return crop

    def evaluate(self, size: tuple[int, int]) -> Transform:
        """See `evaluation_transform`."""
        return evaluation_transform(size, self.crop_pct)

    def _policy(self, side: int) -> Any:
        if self.randaugment is None:
            return None
        fill = tuple(max(0, min(255, round(255 * float(value)))) for value in self.mean)
        options = {
            "translate_const": int(0.45 * side),
            "img_mean": fill if len(fill) == 3 else fill[0],
            "interpolation": Image.Resampling.BICUBIC,
        }
        if not self.randaugment.startswith("rand"):
            raise UserError(f"augment.randaugment={self.randaugment} is no policy: write it as rand-m9-mstd0.5-inc1")
        try:
            policy = rand_augment_transform(self.randaugment, options)
        except (AssertionError, ValueError, KeyError) as error:
            raise UserError(
                f"augment.randaugment={self.randaugment} is no policy ({error}): write it as rand-m9-mstd0.5-inc1"
            ) from error
        for op in policy.ops:
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize
        return policy


class _Seeded:
    """A transform of timm's, of PIL images and with other random numbers than torch's, drawing a seed from torch's."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, pixels: Tensor) -> Tensor:
        if pixels.dtype != torch.uint8:
            raise UserError(
                "augment.randaugment works on pictures with 8 bits per channel, these have more: "
                "set augment.randaugment=null"
            )
        with seeded(int(torch.randint(2**63 - 1, ()))):
            return to_tensor(self.transform(F.to_pil_image(pixels)))


def _posterize(image: Image.Image, bits: int, **options: object) -> Image.Image:
    # At the highest severity timm asks for no bits at all, which was black until Pillow 13 refused it.
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def evaluation_transform(size: tuple[int, int], crop_pct: float | str = "auto") -> Transform:
    """The published way to evaluate, bicubic: resize and crop the centre; from 384 px on warp the whole picture.

    Args:
        size: (height, width) of the result in pixels.
        crop_pct: side of the crop as a share of the resized picture's; `auto`: 0.875 below 384 px, else warp.
    """
    share = crop_share(size, crop_pct)
    if share is None:
        return partial(_warp, size=size)
    return partial(_resize_and_crop, size=size, crop_pct=share)


def crop_share(size: tuple[int, int], crop_pct: float | str) -> float | None:
    """The crop's side as a share of the resized picture's; None where whole pictures are warped."""
    check_crop_pct(crop_pct)
    if crop_pct == "auto":
        return 0.875 if max(size) < WARP_FROM else None
    return None if crop_pct == "warp" else float(crop_pct)


def check_crop_pct(crop_pct: float | str) -> None:
    """Refuses what is no share.

    Raises:
        UserError: says so.
    """
    if crop_pct not in ("auto", "warp") and (isinstance(crop_pct, str) or not 0 < crop_pct <= 1):
        raise UserError(f"augment.crop_pct={crop_pct!r} must be a share in (0, 1], auto or warp")


def _warp(picture: Picture, size: tuple[int, int]) -> Tensor:
    return _resized(picture.decode(), size)


def _resize_and_crop(picture: Picture, size: tuple[int, int], crop_pct: float) -> Tensor:
    height, width = (math.floor(side / crop_pct) for side in size)
    sides = picture.size
    if height == width:  # as torchvision's Resize: the short side exactly, the long one cut to whole pixels
        short = min(sides)
        resized = [int(height * side / short) for side in sides]
    else:  # as timm's for an oblong model: rounded
        ratio = min(sides[0] / height, sides[1] / width)
        resized = [round(side / ratio) for side in sides]
    pixels = picture.decode()
    for axis in range(2):  # a strip, such as 16000 x 1: what lies far from the crop is not even enlarged
        if resized[axis] > _STRIP * size[axis]:
            kept = math.ceil(sides[axis] * _STRIP * size[axis] / resized[axis])
            resized[axis] = round(resized[axis] * kept / sides[axis])
            sides = (kept, sides[1]) if axis == 0 else (sides[0], kept)
    if sides != picture.size:
        pixels = F.center_crop(pixels, list(sides))
    return F.center_crop(_resized(pixels, (resized[0], resized[1])), list(size))


def _resized(pixels: Pixels, size: tuple[int, int]) -> Tensor:
    if isinstance(pixels, Image.Image):  # PIL's own, as in timm
        return to_tensor(pixels.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return F.resize(pixels, list(size), InterpolationMode.BICUBIC, antialias=True)
