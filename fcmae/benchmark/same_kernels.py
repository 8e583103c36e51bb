"""The baseline `same kernels`: our own code on the same engine, with every patch visible to the encoder.

Against it a ratio says what leaving out hidden patches saves, and nothing of how good the kernels are. Decoder and
loss are those of the model: both need the visible patches alone.
"""

import copy

from torch import Tensor

from fcmae.masking import Mask
from fcmae.models.encoder import Encoder
from fcmae.models.fcmae import FCMAE
from fcmae.packing import pack


class SameKernelsEncoder(Encoder):
    """Takes the place of `Encoder`: same parameters and output shape, but computed from whole images.

    Its features know the hidden pixels, so nothing can be learnt with it.
    """

    def forward(self, images: Tensor, mask: Mask) -> Tensor:
        """images (B, C, H, W) -> packed features of the last stage (B, C4, V*p, p), p = mask patch / 32."""
        x = super().forward(images, Mask.everything(len(images), *mask.grid, device=images.device))  # (B, C4, L*p, p)
        batch, channels, _, p = x.shape
        cells = x.permute(0, 2, 3, 1).reshape(batch, *mask.grid, p * p * channels)  # one position per patch
        seen = pack(cells.permute(0, 3, 1, 2), mask).permute(0, 2, 3, 1)  # (B, V, 1, p*p*C4)
        return seen.reshape(batch, -1, p, channels).permute(0, 3, 1, 2)


def as_same_kernels(model: FCMAE) -> FCMAE:
    """The same model with a copy of its weights and an encoder that sees everything; `model` is left as it is."""
    parts = copy.deepcopy(model)
    encoder = SameKernelsEncoder(
        parts.encoder.net,
        engine=parts.encoder.engine,
        grn_scope=parts.encoder.grn_scope,
        grad_checkpointing=parts.encoder.grad_checkpointing,
    )
    full = FCMAE(encoder=encoder, decoder=parts.decoder, masking=parts.masking, target=parts.target)
    return full.train(model.training)
