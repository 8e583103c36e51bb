"""The fully convolutional masked autoencoder, paper figure 2 (ConvNeXt V2, arXiv 2301.00808). Start reading here.

    images --masking--> visible patches --encoder--> features --decoder--> a prediction of every patch
                                                                              |
    images --target--> what the patches should be  ----------------------> loss on the hidden ones

Shapes: B images, C channels, (H, W) pixels, p mask patch side in pixels, L = (H/p) * (W/p) patches, V of them visible,
D target values of a patch, T at each of its places.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fcmae.errors import UserError
from fcmae.masking import Mask, Masking
from fcmae.models.decoder import Decoder
from fcmae.models.encoder import Encoder
from fcmae.models.targets import Target
from fcmae.packing import take_rows


class Output(NamedTuple):
    """What a forward pass gives."""

    loss: Tensor
    """Scalar: mean squared error over the hidden patches of the batch, in float32 at least."""
    pred: Tensor
    """(B, L-V, D): the D target values of every hidden patch, in the order of `mask.hidden.index`; of all L patches if
    that was asked for. Pixels, D = p*p*C, are ordered (row, column, channel)."""
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
                has another grid, or it hides nothing, so that there is nothing to learn; or the target gives other
                values than it says.
        """
        mask = self.masking(images) if mask is None else mask
        self._check(images, mask)
        hidden = mask.hidden
        features = self.encoder(images, mask)  # (B, C4, V*p/32, p/32)
        wanted = Mask.everything(len(images), *mask.grid, device=images.device) if whole else hidden
        pred = self._patches(self.decoder(features, mask, wanted))  # (B, L or L-V, D)
        return Output(self._loss(images, take_rows(pred, hidden.index) if whole else pred, hidden), pred, mask)

    def _patches(self, pred: Tensor) -> Tensor:
        """(B, s*s*T, n*k, k) -> (B, n, D): the k x k cells of each of n patches, of s x s places, become one patch."""
        batch, side, k = pred.shape[0], self.encoder.stride // self.target.stride, pred.shape[3]
        x = pred.view(batch, side, side, -1, pred.shape[2] // k, k, k)  # (B, row, column, T, n, cell row, column)
        return x.permute(0, 4, 5, 1, 6, 2, 3).flatten(2)

    def _loss(self, images: Tensor, pred: Tensor, hidden: Mask) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            target = self.target(images, hidden)  # (B, L-V, D)
            if target.shape != pred.shape:
                raise UserError(
                    f"(images, hidden patches, values) are {tuple(target.shape)} of the target and {tuple(pred.shape)} "
                    "of the decoder: mend one; (patch / stride)**2 * channels of the target say how many values"
                )
            target = target.to(torch.promote_types(target.dtype, torch.float32))
            return (pred.to(target.dtype) - target).square().mean()

    def _check(self, images: Tensor, mask: Mask) -> None:
        channels = self.encoder.in_chans
        if images.ndim != 4 or images.shape[1] != channels or len(images) == 0:
            raise UserError(f"images have shape {tuple(images.shape)}, the model takes (B, {channels}, H, W), B from 1")
        mask.check(images, self.masking.patch_size)
