"""Whether another library computes what our network does: on photographs, in float32."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from fcmae.data.preparation import Preparation

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Difference:
    """How far apart two computations are.

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
    def is_rounding(self) -> bool:
        """Whether it is what float32 allows: 1e-5, or that share of the values where they are larger than 1."""
        return self.largest <= TOLERANCE * max(1.0, self.scale)  # false for what is not a number

    def __str__(self) -> str:
        height, width = self.size
        what = f"{self.images} photographs of {height}x{width} px"
        return f"largest difference {self.largest:.1e}, of values up to {self.scale:.3g}, on {what}"


def photographs(preparation: Preparation) -> Tensor:
    """The two photographs that come with scikit-learn, as the network takes them: (2, C, H, W), normalised.

    Where there are not three channels, those of the photographs serve in turn.
    """
    pixels = torch.stack([torch.tensor(image) for image in load_sample_images().images]).permute(0, 3, 1, 2)
    pixels = F.resize(pixels, list(preparation.image_size), antialias=True)
    return preparation.normalization()(pixels[:, torch.arange(preparation.in_chans) % 3])


def difference(expected: Sequence[Tensor], found: Sequence[Tensor], images: Tensor) -> Difference:
    """How far what another library found is from what was expected; infinitely, if it is of another shape."""
    largest, scale = 0.0, 0.0
    pairs = list(zip(expected, found, strict=False)) if len(expected) == len(found) else []
    for ours, theirs in pairs:
        scale = max(scale, float(ours.abs().max()))
        same_shape = ours.shape == theirs.shape
        apart = float((ours.double() - theirs.double()).abs().max()) if same_shape else float("inf")
        largest = apart if not apart <= largest else largest  # keeps what is not a number
    size = (images.shape[2], images.shape[3])
    return Difference(largest if pairs else float("inf"), scale, len(images), size)
