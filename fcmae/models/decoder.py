"""The lightweight decoder: a plain dense ConvNeXt V2 block over encoded patches and mask tokens."""

import torch
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn, where, zeros

from fcmae.engines import Engine
from fcmae.masking import Mask
from fcmae.models.block import convnext_block, linear
from fcmae.models.convnext import initialize
from fcmae.packing import pack, unpack


class Decoder(nn.Module):
    """Fills hidden places with a learned token and predicts patches (paper section 3.1).

    Shapes: (hs, ws) is the image in units of the network's stride of 32 pixels, p = mask patch / 32.

    Args:
        in_channels: channels of the encoder's last stage.
        out_channels: values to predict per 32x32 pixels.
        engine: computes the blocks, see `fcmae.engines`.
        depth: number of ConvNeXt V2 blocks, from 1: they alone carry what is seen to hidden places.
        dim: their width.
    """

    def __init__(self, *, in_channels: int, out_channels: int, engine: Engine, depth: int = 1, dim: int = 512) -> None:
        super().__init__()
        self.engine = engine
        self.run_block = convnext_block
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=1)
        self.mask_token = nn.Parameter(zeros(1, dim, 1, 1))
        self.blocks = nn.ModuleList(ConvNeXtBlock(dim, use_grn=True, ls_init_value=None) for _ in range(depth))
        self.pred = nn.Conv2d(dim, out_channels, kernel_size=1)
        initialize(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, packed: Tensor, mask: Mask, wanted: Mask) -> Tensor:
        """packed (B, C4, V*p, p) -> predictions of the n patches that are wanted, packed: (B, out_channels, n*p, p)."""
        x = unpack(_pointwise(self.proj, packed), mask)  # (B, dim, hs, ws)
        x = where(mask.at(packed.shape[-1]), x, self.mask_token.to(x.dtype))
        everything = Mask.everything(len(x), *x.shape[2:], device=x.device)
        whole = wanted.visible_patches == wanted.patches
        for block in self.blocks if whole else self.blocks[:-1]:
            x = self.run_block(block, _as_packed(x), self.engine, everything).view(x.shape)
        if whole:
            return _pointwise(self.pred, pack(x, wanted))
        cells = _cells(x, wanted)  # all that the last block need compute, once it has its norms
        x = self.run_block(self.blocks[-1], _as_packed(x), self.engine, everything, rows=cells)  # (B, dim, n*p*p, 1)
        p = packed.shape[-1]
        return _pointwise(self.pred, x).view(len(x), -1, cells.shape[1] // p, p)


def _cells(x: Tensor, wanted: Mask) -> Tensor:
    """Which positions of x (B, C, H, W), row by row, lie in the n wanted patches, in packed order: (B, n*p*p)."""
    numbers = torch.arange(x.shape[2] * x.shape[3], device=x.device).view(1, 1, *x.shape[2:])
    return pack(numbers.expand(len(x), -1, -1, -1), wanted).flatten(1)


def _as_packed(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H*W, 1): an image whose patches, of one position, are all visible is packed as it is."""
    return x.flatten(2).unsqueeze(-1)


def _pointwise(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution (B, C, H, W) -> (B, D, H, W) as the linear layer that it is, which torch computes faster."""
    return linear(layer, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
