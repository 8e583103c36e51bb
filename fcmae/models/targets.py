"""What the decoder has to predict.

Shapes: B images, C channels, p mask patch side in pixels, L patches per image, row by row, n of them wanted.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fcmae.masking import Mask
from fcmae.packing import pack


class Target(Protocol):
    """What is to be predicted of an image: a map of values, of which the loss asks for the hidden patches.

    `stride` is the distance of its places in pixels, a divisor of 32: 1 for pixels, 8 for histograms of 8x8 pixels, 32
    for the features of a network with that stride.
    """

    stride: int

    def channels(self, in_chans: int) -> int:
        """How many values the map has at each place, for images with so many channels."""
        ...

    def __call__(self, images: Tensor, wanted: Mask) -> Tensor:
        """images (B, C, H, W) -> the n wanted patches of the map (B, n, (p/stride)**2 * channels).

        In a patch, values are ordered (row, column, channel), see `map_patches`. A patch's values may follow from the
        whole image, but not from which other patches are wanted.
        """
        ...


@runtime_checkable
class DrawableTarget(Target, Protocol):
    """A target whose predictions can be looked at; with others no reconstructions are drawn."""

    def to_pixels(self, pred: Tensor, images: Tensor, patch_size: int) -> Tensor:
        """What a prediction looks like: pred (B, L, ...) of `images` (B, C, H, W) -> pictures (B, C, H, W)."""
        ...


class Pixels:
    """The pixels themselves, normalised per patch or raw (paper section 3.1; MAE, He et al. 2022, section 4).

    Args:
        norm_pix_loss: subtract each patch's mean and divide by its deviation (unbiased variance, eps 1e-6), all
            channels together.
    """

    stride = 1

    def __init__(self, *, norm_pix_loss: bool = True) -> None:
        self.norm_pix_loss = norm_pix_loss

    def channels(self, in_chans: int) -> int:
        """The image's own."""
        return in_chans

    def __call__(self, images: Tensor, wanted: Mask) -> Tensor:
        """images (B, C, H, W) -> (B, n, p*p*C), in float32 at least."""
        pixels = _at_least_float32(map_patches(images, wanted))
        if self.norm_pix_loss:
            mean, deviation = _patch_statistics(pixels)
            pixels = (pixels - mean) / deviation
        return pixels

    def to_pixels(self, pred: Tensor, images: Tensor, patch_size: int) -> Tensor:
        """pred (B, L, p*p*C) -> (B, C, H, W); a normalised prediction gets each patch's own mean and deviation back."""
        pred = _at_least_float32(pred)
        if self.norm_pix_loss:
            mean, deviation = _patch_statistics(patchify(_at_least_float32(images), patch_size))
            pred = pred * deviation + mean
        return unpatchify(pred, patch_size, images.shape[-2], images.shape[-1])


def map_patches(x: Tensor, wanted: Mask) -> Tensor:
    """The wanted patches of a map with q places per side of a patch: (B, C, h*q, w*q) -> (B, n, q*q*C).

    Ordered (row, column, channel), as a target has them.

    Raises:
        UserError: the map does not fit the mask's grid.
    """
    packed = pack(x, wanted)  # (B, C, n*q, q)
    return patchify(packed, packed.shape[3])


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, L, p*p*C), pixels ordered (row, column, channel) inside a patch."""
    batch, channels, height, width = images.shape
    p = patch_size
    x = images.reshape(batch, channels, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, p * p * channels)


def unpatchify(patches: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """The inverse of `patchify`: (B, L, p*p*C) -> (B, C, H, W)."""
    p = patch_size
    x = patches.reshape(patches.shape[0], height // p, width // p, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, height, width)


def _patch_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    # torch.var_mean takes several times as long on the CPU.
    mean = pixels.mean(dim=-1, keepdim=True)  # (B, L, 1)
    variance = (pixels - mean).square().sum(dim=-1, keepdim=True) / (pixels.shape[-1] - 1)
    return mean, (variance + 1e-6).sqrt()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
