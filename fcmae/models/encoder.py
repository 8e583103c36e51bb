"""The sparse encoder: timm's ConvNeXt, its modules and parameters untouched, executed on packed images."""

import math

from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from fcmae.engines import Engine
from fcmae.errors import UserError
from fcmae.masking import Mask
from fcmae.models.block import GRNScope, Recompute, convnext_block, patch_layer
from fcmae.packing import pack


class Encoder(nn.Module):
    """Runs a ConvNeXt on the visible patches of each image and on nothing else (paper section 3.1).

    Stem, downsampling, normalisation and MLPs never reach over the border of a patch, so they act on the packed image
    as they are; the depthwise convolution comes from an engine, which knows the mask. No gradient and no influence
    comes from hidden pixels.

    Args:
        net: timm's ConvNeXt with stem stride 4. Its final norm (`net.head.norm`) plays no part in pre-training: it
            is kept, frozen at the identity's scale and shift, so that the state dict is timm's.
        engine: computes the depthwise convolution and the activation, see `fcmae.engines`.
        grn_scope: `image`, or `batch` to reproduce the original PyTorch code.
        grad_checkpointing: what the backward pass computes anew instead of keeping its activations: `none`, each
            `mlp`, or each `block`.

    Raises:
        UserError: an unknown scope or kind of checkpointing, or a network that does not work patch by patch.
    """

    stride = 32

    def __init__(
        self,
        net: ConvNeXt,
        *,
        engine: Engine,
        grn_scope: GRNScope = "image",
        grad_checkpointing: Recompute = "none",
    ) -> None:
        super().__init__()
        if grn_scope not in ("image", "batch"):
            raise UserError(f"grn_scope={grn_scope!r} is unknown: use 'image' or 'batch'")
        if grad_checkpointing not in ("none", "mlp", "block"):
            raise UserError(f"grad_checkpointing={grad_checkpointing!r} is unknown: use 'none', 'mlp' or 'block'")
        _check_patchwise(net)
        self.net = net
        self.net.head.requires_grad_(False)
        self.in_chans: int = net.stem[0].in_channels  # type: ignore[assignment]
        self.engine = engine
        self.grn_scope = grn_scope
        self.grad_checkpointing = grad_checkpointing
        self.run_block = convnext_block

    def forward(self, images: Tensor, mask: Mask) -> Tensor:
        """images (B, C, H, W) -> packed features of the last stage (B, C4, V*p, p), p = mask patch / 32.

        Raises:
            UserError: the engine cannot work on the images' device.
        """
        self.engine.check_device(images.device)
        x = pack(images, mask)  # (B, C, V*32, 32) for 32-pixel patches
        for layer in self.net.stem:
            x = patch_layer(layer, x)  # (B, C1, V*8, 8)
        recompute = self.grad_checkpointing if self.training else "none"
        for stage in self.net.stages:
            for layer in stage.downsample.children():
                x = patch_layer(layer, x)
            for block in stage.blocks:
                x = self.run_block(block, x, self.engine, mask, grn_scope=self.grn_scope, recompute=recompute)
        return self.net.norm_pre(x)


def _check_patchwise(net: ConvNeXt) -> None:
    """Refuses networks whose stem or downsampling reaches over a patch's border, or whose stride is not 32."""
    stem = list(net.stem)
    downsample = [module for stage in net.stages for module in stage.downsample.modules()]
    steps = [module for module in (*stem, *downsample) if isinstance(module, nn.Conv2d)]
    if any(module.eps != 1e-6 for module in net.modules() if isinstance(module, GlobalResponseNorm)):
        raise UserError("the network's GRN has another eps than 1e-6, which the engines compute with")
    depthwise: list[nn.Conv2d] = [block.conv_dw for stage in net.stages for block in stage.blocks]
    if (
        any(conv.kernel_size != conv.stride or conv.padding != (0, 0) for conv in steps)
        or any(conv.dilation != (1, 1) or conv.stride != (1, 1) for conv in depthwise)
        or math.prod(conv.stride[0] for conv in steps) != Encoder.stride
    ):
        raise UserError(
            "the network's stem or downsampling overlaps, is dilated, or its stride is not 32: "
            "only ConvNeXts with stem_type='patch', patch_size=4 and output_stride=32 run on packed images"
        )
