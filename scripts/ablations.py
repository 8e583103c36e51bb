"""Variants of the method for `scripts/results.sh`: what they leave out is what they are there to measure."""

from typing import Any

from torch import Tensor

from fcmae import FCMAE, Mask, create_model
from fcmae.engines import get_engine
from fcmae.models.encoder import Encoder
from fcmae.packing import pack


class LeakyEncoder(Encoder):
    """An ordinary network on the image with its hidden patches set to zero, once, at the input.

    Every depthwise convolution carries something over the borders of hidden patches, so what lies beside them tells
    the network where they are and what surrounds them, and each norm counts their positions (paper table 1: "w/o
    sparse conv").
    """

    def forward(self, images: Tensor, mask: Mask) -> Tensor:
        """images (B, C, H, W) -> packed features of the last stage (B, C4, V*p, p)."""
        seen = mask.at(images.shape[2] // mask.visible.shape[1])  # (B, 1, H, W)
        return pack(self.net.forward_features(images * seen), mask)


def leaky(**options: Any) -> FCMAE:
    """`fcmae.create_model`, with a leaky encoder instead of the sparse one; takes the same options."""
    model = create_model(**options)
    model.encoder = LeakyEncoder(model.encoder.net, engine=get_engine("torch"))
    return model
