"""Pictures for classification, as the published fine-tuning recipes treat them (original code; timm)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.functional import center_crop, pil_to_tensor

from fcmae.data.randomness import seeded
from fcmae.data.transforms import Transform, check_crop_scale, random_crop
from fcmae.errors import UserError

WARP_FROM = 384
"""Pixels from which on pictures are evaluated whole, warped to the model's shape, and not cropped (original code)."""


@dataclass(frozen=True, kw_only=True)
class ClassificationAugment:
    """Random crop and flip, then RandAugment, or colour jitter instead; to evaluate, by the published rule.

    Args:
        crop_scale: least and largest share of the picture's area that a crop may cover.
        flip: mirror every other picture.
        randaugment: timm's description of a policy, such as `rand-m9-mstd0.5-inc1`; None for none.
        color_jitter: strength of the changes of brightness, contrast and saturation; as in timm only without
            RandAugment, and on pictures with three channels.
        mean: per channel, of pixels in [0, 1]: fills what a rotation or a shift uncovers.
        crop_pct: to evaluate, the side of the centred crop as a share of the resized picture's short side; `auto`:
            0.875 below 384 px; from there on the whole picture, warped.

    Raises:
        UserError: a value out of its bounds, or a policy that timm does not know.
    """

    crop_scale: Sequence[float]
    flip: bool
    randaugment: str | None
    color_jitter: float
    mean: Sequence[float]
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
        steps: list[Any] = [random_crop(size, self.crop_scale, self.flip)]
        policy = self._policy(min(size))
        if policy is not None:
            steps.append(_Seeded(policy))
        elif self.color_jitter and len(self.mean) == 3:
            steps.append(v2.ColorJitter(self.color_jitter, self.color_jitter, self.color_jitter))
        return v2.Compose([*steps, v2.PILToTensor()])

    def evaluate(self, size: tuple[int, int]) -> Transform:
        """See `evaluation_transform`."""
        return evaluation_transform(size, self.crop_pct)

    def _policy(self, side: int) -> Any:
        if self.randaugment is None:
            return None
        fill = tuple(min(255, round(255 * value)) for value in self.mean)
        options = {
            "translate_const": int(0.45 * side),
            "img_mean": fill if len(fill) == 3 else fill[0],
            "interpolation": Image.Resampling.BICUBIC,
        }
        if not self.randaugment.startswith("rand"):
            raise UserError(f"augment.randaugment={self.randaugment} is no policy: write it as rand-m9-mstd0.5-inc1")
        try:
            return rand_augment_transform(self.randaugment, options)
        except (AssertionError, ValueError, KeyError) as error:
            raise UserError(
                f"augment.randaugment={self.randaugment} is no policy ({error}): write it as rand-m9-mstd0.5-inc1"
            ) from error


class _Seeded:
    """A transform of timm's, whose random numbers are not torch's, drawing from a seed of torch's."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> Image.Image:
        with seeded(int(torch.randint(2**63 - 1, ()))):
            changed: Image.Image = self.transform(image)
        return changed


def evaluation_transform(size: tuple[int, int], crop_pct: float | str = "auto") -> Transform:
    """The published way to evaluate, bicubic: resize and crop the centre; from 384 px on warp the whole picture.

    Args:
        size: (height, width) of the result in pixels.
        crop_pct: side of the crop as a share of the resized picture's; `auto`: 0.875 below 384 px, else warp.
    """
    check_crop_pct(crop_pct)
    if crop_pct == "auto":
        crop_pct = 0.875 if max(size) < WARP_FROM else "warp"
    if crop_pct == "warp":
        return partial(_warp, size=size)
    return partial(_resize_and_crop, size=size, crop_pct=float(crop_pct))


def check_crop_pct(crop_pct: float | str) -> None:
    """Refuses what is no share.

    Raises:
        UserError: says so.
    """
    if crop_pct not in ("auto", "warp") and (isinstance(crop_pct, str) or not 0 < crop_pct <= 1):
        raise UserError(f"augment.crop_pct={crop_pct!r} must be a share in (0, 1], auto or warp")


def _warp(image: Image.Image, size: tuple[int, int]) -> Tensor:
    return pil_to_tensor(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _resize_and_crop(image: Image.Image, size: tuple[int, int], crop_pct: float) -> Tensor:
    height, width = (math.floor(side / crop_pct) for side in size)
    if height == width:  # as torchvision's Resize: the short side exactly, the long one cut to whole pixels
        short = min(image.size)
        resized = [int(height * side / short) for side in image.size]
    else:  # as timm's for an oblong model: rounded
        ratio = min(image.width / width, image.height / height)
        resized = [round(side / ratio) for side in image.size]
    return pil_to_tensor(center_crop(image.resize((resized[0], resized[1]), Image.Resampling.BICUBIC), list(size)))
