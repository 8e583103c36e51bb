"""What becomes of a batch of normalised training images, on the device: erased rectangles, mixup and cutmix."""

from dataclasses import dataclass

import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from fcmae.data.randomness import seeded
from fcmae.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BatchAugment:
    """timm's random erasing, then its mixup and cutmix, as in the published recipes (paper tables 9 to 13).

    Their random numbers follow from torch's generator.

    Args:
        random_erasing: probability that a rectangle of an image becomes noise.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of cutmix; 0 for none. With both, each batch gets one or the other, by equal chance.

    Raises:
        UserError: a value out of its bounds.
    """

    random_erasing: float
    mixup: float
    cutmix: float

    def __post_init__(self) -> None:
        if not 0 <= self.random_erasing <= 1:
            raise UserError(f"batch_augment.random_erasing={self.random_erasing} must be a share in [0, 1]")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise UserError(f"batch_augment.{name}={getattr(self, name)} must be a number from 0")

    @property
    def mixes(self) -> bool:
        """Whether images and their labels are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def check(self, *, batch_size: int, multi_label: bool) -> None:
        """Refuses batches that cannot be mixed.

        Raises:
            UserError: an odd batch, or images with several labels.
        """
        if self.mixes and batch_size % 2:
            raise UserError(
                f"data.batch_size={batch_size} is odd, and mixup and cutmix pair images: make it even, or set "
                "batch_augment.mixup=0 batch_augment.cutmix=0"
            )
        if self.mixes and multi_label:
            raise UserError(
                "mixup and cutmix need one label per image: set batch_augment.mixup=0 batch_augment.cutmix=0"
            )

    def __call__(self, images: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """Changes images and labels.

        Args:
            images: (B, C, H, W) normalised; may be written to.
            labels: (B,) int64, or (B, classes).
            num_classes: number of classes.

        Returns:
            The images, and the labels; where they are mixed, as (B, classes) shares.
        """
        with seeded(int(torch.randint(2**63 - 1, ()))):
            if self.random_erasing:
                erase = RandomErasing(self.random_erasing, mode="pixel", device=images.device)
                images = erase(images)
            if not self.mixes:
                return images, labels
            mix = Mixup(mixup_alpha=self.mixup, cutmix_alpha=self.cutmix, label_smoothing=0.0, num_classes=num_classes)
            images, shares = mix(images, labels)
            return images, shares
