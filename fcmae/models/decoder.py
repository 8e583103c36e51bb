"""The lightweight decoder: a plain dense ConvNeXt V2 block over encoded patches and mask tokens."""

import torch.nn.functional as F
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn, where, zeros

from fcmae.masking import Mask
from fcmae.models.block import convnext_block, initialize
from fcmae.packing import unpack


class Decoder(nn.Module):
    """Fills hidden places with a learned token and predicts every patch (paper section 3.1).

    Shapes: (hs, ws) is the image in units of the network's stride of 32 pixels.

    Args:
        in_channels: channels of the encoder's last stage.
        out_channels: values to predict per 32x32 pixels.
        depth: number of ConvNeXt V2 blocks.
        dim: their width.
    """

    def __init__(self, *, in_channels: int, out_channels: int, depth: int = 1, dim: int = 512) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=1)
        self.mask_token = nn.Parameter(zeros(1, dim, 1, 1))
        self.blocks = nn.ModuleList(ConvNeXtBlock(dim, use_grn=True, ls_init_value=None) for _ in range(depth))
        self.pred = nn.Conv2d(dim, out_channels, kernel_size=1)
        initialize(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, packed: Tensor, mask: Mask) -> Tensor:
        """packed (B, C4, V*p, p) -> predictions (B, out_channels, hs, ws)."""
        x = unpack(self.proj(packed), mask)  # (B, dim, hs, ws)
        p = packed.shape[-1]
        visible = mask.visible.repeat_interleave(p, dim=1).repeat_interleave(p, dim=2)  # (B, hs, ws)
        x = where(visible[:, None], x, self.mask_token.to(x.dtype))
        for block in self.blocks:
            x = convnext_block(block, x, _dense_depthwise)  # type: ignore[arg-type]
        return self.pred(x)


def _dense_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
