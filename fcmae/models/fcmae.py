"""The fully convolutional masked autoencoder, paper figure 2 (ConvNeXt V2, arXiv 2301.00808). Start reading here.

    images --masking--> visible patches --encoder--> features --decoder--> a prediction of every patch
                                                                              |
    images --target--> what the patches should be  ----------------------> loss on the hidden ones

Shapes: B images, C channels, (H, W) pixels, p mask patch side in pixels, L = (H/p) * (W/p) patches, V of them visible.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fcmae.engines.grn import take_rows
from fcmae.errors import UserError
from fcmae.masking import Mask, Masking, patch_grid
from fcmae.models.decoder import Decoder
from fcmae.models.encoder import Encoder
from fcmae.models.targets import Target
from fcmae.packing import pack


class Output(NamedTuple):
    """What a forward pass gives."""

    loss: Tensor
    """Scalar: mean squared error over the hidden patches of the batch, in float32 at least."""
    pred: Tensor
    """(B, L-V, p*p*C): the prediction of every hidden patch, in the order of `mask.hidden.index`; of all L patches
    if that was asked for. Pixels are ordered (row, column, channel)."""
    mask: Mask


class FCMAE(nn.Module):
    """Encoder, decoder, a strategy that hides patches, and the target to reconstruct.

    Built from parts; `fcmae.create_model` puts the usual ones together.
    """

    def __init__(self, *, encoder: Encoder, decoder: Decoder, masking: Masking, target: Target) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.masking = masking
        self.target = target

    def forward(self, images: Tensor, mask: Mask | None = None, *, whole: bool = False) -> Output:
        """images (B, C, H, W) -> Output; draws a mask if none is given.

        Args:
            images: normalised as the model is to see them.
            mask: what it may see.
            whole: predict visible patches too. The loss does not need them.

        Raises:
            UserError: the images' channels are not the encoder's, their sides are no multiples of the patch, the mask
                has another grid, or it hides nothing, so that there is nothing to learn.
        """
        mask = self.masking(images) if mask is None else mask
        self._check(images, mask)
        hidden = mask.hidden
        features = self.encoder(images, mask)  # (B, C4, V*p/32, p/32)
        wanted = Mask.everything(len(images), *mask.grid, device=images.device) if whole else hidden
        pred = self._patches(self.decoder(features, mask, wanted))  # (B, L or L-V, p*p*C)
        return Output(self._loss(images, take_rows(pred, hidden.index) if whole else pred, hidden), pred, mask)

    def _patches(self, pred: Tensor) -> Tensor:
        """(B, 32*32*C, n*k, k) -> (B, n, p*p*C): the k x k cells of each of n patches become one patch."""
        batch, stride, k = pred.shape[0], self.encoder.stride, pred.shape[3]
        x = pred.view(batch, stride, stride, -1, pred.shape[2] // k, k, k)  # (B, row, column, C, n, cell row, column)
        return x.permute(0, 4, 5, 1, 6, 2, 3).flatten(2)

    def _loss(self, images: Tensor, pred: Tensor, hidden: Mask) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            target = self.target(pack(images, hidden), self.masking.patch_size)  # (B, L-V, p*p*C)
            return (pred.to(target.dtype) - target).square().mean()

    def _check(self, images: Tensor, mask: Mask) -> None:
        channels = self.encoder.in_chans
        if images.ndim != 4 or images.shape[1] != channels or len(images) == 0:
            raise UserError(f"images have shape {tuple(images.shape)}, the model takes (B, {channels}, H, W), B from 1")
        grid = patch_grid(images.shape[2], images.shape[3], self.masking.patch_size)
        if mask.grid != grid or mask.visible.shape[0] != images.shape[0]:
            raise UserError(
                f"the mask is for {mask.visible.shape[0]} images of {mask.grid[0]}x{mask.grid[1]} patches, "
                f"the batch has {images.shape[0]} of {grid[0]}x{grid[1]}"
            )
        if mask.index.shape[1] in (0, grid[0] * grid[1]):
            raise UserError(
                f"the mask shows {mask.index.shape[1]} of {grid[0] * grid[1]} patches: "
                "at least one must be visible and one hidden to learn from; change mask_ratio or the image size"
            )
