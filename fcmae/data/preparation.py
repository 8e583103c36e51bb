"""How pictures are prepared for a trained network: what training decided and a checkpoint remembers."""

from dataclasses import dataclass

from fcmae.data.classification_transforms import crop_share, evaluation_transform
from fcmae.data.loader import Normalization
from fcmae.data.transforms import Transform


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """From a decoded picture to a network's input.

    Attributes:
        image_size: (height, width) in pixels.
        mean: per channel, of pixels in [0, 1].
        std: per channel.
        crop_pct: how pictures are fitted to the size, see `evaluation_transform`.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float | str

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return len(self.mean)

    @property
    def crop_share(self) -> float | None:
        """The crop's side as a share of the resized picture's; None where whole pictures are warped."""
        return crop_share(self.image_size, self.crop_pct)

    def transform(self) -> Transform:
        """PIL image -> (C, H, W) uint8."""
        return evaluation_transform(self.image_size, self.crop_pct)

    def normalization(self) -> Normalization:
        """(B, C, H, W) uint8 -> float32."""
        return Normalization(self.mean, self.std)
