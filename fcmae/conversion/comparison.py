"""Whether another library computes what our network does: on photographs, in float32."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from fcmae.data.preparation import Preparation

TOLERANCE = 1e-5
_LEAST_SCALE = 1e-3


@dataclass(frozen=True)
class Difference:
    """How far apart two computations are, in the output where that is most for its scale.

    Attributes:
        largest: of all absolute differences.
        scale: the largest absolute value that was expected.
        images: how many there were.
        size: (height, width) of them in pixels.
    """

    largest: float
    scale: float
    images: int
    size: tuple[int, int]

    @property
    def share(self) -> float:
        """The largest difference as a share of the scale, which counts as 1e-3 at least; infinite if it is not known.

        A freshly begun classifier gives logits of 1e-4, against which a bound of 1e-5 would prove nothing.
        """
        share = self.largest / max(_LEAST_SCALE, self.scale)
        return math.inf if math.isnan(share) else share

    @property
    def is_rounding(self) -> bool:
        """Whether it is what float32 allows: 1e-5 of the scale."""
        return self.share <= TOLERANCE

    def __str__(self) -> str:
        height, width = self.size
        what = f"{self.images} photographs of {height}x{width} px"
        return f"largest difference {self.largest:.1e}, of values up to {self.scale:.3g}, on {what}"


def photographs(preparation: Preparation) -> Tensor:
    """The two photographs that come with scikit-learn, as the network takes them: (2, C, H, W), normalised.

    Where there are more than three channels, those of the photographs serve in turn, shifted by some pixels more each
    time: no two are alike, or a network with two of them confused would compute the same.
    """
    pixels = torch.stack([torch.tensor(image) for image in load_sample_images().images]).permute(0, 3, 1, 2)
    pixels = F.resize(pixels, list(preparation.image_size), antialias=True)
    rows = pixels.flatten(2)
    channels = [rows[:, channel % 3].roll(5 * (channel // 3), dims=1) for channel in range(preparation.in_chans)]
    shifted = torch.stack(channels, 1).unflatten(2, pixels.shape[2:])
    return preparation.normalization()(shifted)


def difference(expected: Sequence[Tensor], found: Sequence[Tensor], images: Tensor) -> Difference:
    """How far what another library found is from what was expected; infinitely, if it is of another shape."""
    size = (images.shape[2], images.shape[3])
    if not expected or len(expected) != len(found):
        return Difference(math.inf, 0.0, len(images), size)
    pairs = zip(expected, found, strict=True)
    apart = [Difference(_apart(*pair), float(pair[0].abs().max()), len(images), size) for pair in pairs]
    return max(apart, key=lambda one: one.share)


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max()) if ours.shape == theirs.shape else math.inf
