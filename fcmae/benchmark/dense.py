"""The baseline of every speed-up: the masked dense network, in plain PyTorch.

The paper's JAX code runs the whole map through dense layers and multiplies by the mask (paper section 3.1, "before and
after the dense convolution"). It gives the same numbers as the packed network and does all the arithmetic.

Shapes: B images, C channels, (H, W) positions of the full map at this depth of the network.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXt
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fcmae.engines import Engine
from fcmae.engines import torch as torch_engine
from fcmae.masking import Mask
from fcmae.models.block import GRNScope, Recompute, global_response_norm
from fcmae.models.encoder import Encoder
from fcmae.models.fcmae import FCMAE, Output
from fcmae.packing import pack, take_rows


def _plain_gelu_grn_linear(
    x: Tensor,
    grn_weight: Tensor,
    grn_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None = None,
) -> Tensor:
    y = global_response_norm(F.gelu(x), grn_weight, grn_bias)
    return F.linear(y if rows is None else take_rows(y, rows), weight, bias)


PLAIN = Engine("plain", torch_engine.depthwise, _plain_gelu_grn_linear)


class MaskedDenseFCMAE(FCMAE):
    """Predicts every patch, as the original does, visible ones too."""

    def forward(self, images: Tensor, mask: Mask | None = None, *, whole: bool = True) -> Output:
        """As in `FCMAE`."""
        output = super().forward(images, mask, whole=True)
        hidden = output.mask.hidden.index[:, :, None].expand(-1, -1, output.pred.shape[2])
        return output if whole else output._replace(pred=output.pred.gather(1, hidden))


class MaskedDenseEncoder(Encoder):
    """Takes the place of `Encoder`: same parameters, same state dict, same output, but computed on full-size maps.

    timm's own layers do the work. Features are multiplied by the mask before and after every depthwise convolution
    and before GRN, whose statistics are those of the visible positions. As quick as plain PyTorch makes it: no copies,
    GRN as one fused multiply-add, channels-last if the weights and images are.

    Args:
        net: timm's ConvNeXt with stem stride 4.
        grn_scope: `image` or `batch`, as in `Encoder`.
        grad_checkpointing: as in `Encoder`, but for `mlp`, too, whole blocks are computed anew.
    """

    def __init__(self, net: ConvNeXt, *, grn_scope: GRNScope = "image", grad_checkpointing: Recompute = "none") -> None:
        super().__init__(net, engine=PLAIN, grn_scope=grn_scope, grad_checkpointing=grad_checkpointing)
        self.run_masked_block = _masked_block

    def forward(self, images: Tensor, mask: Mask) -> Tensor:
        """images (B, C, H, W) -> packed features of the last stage (B, C4, V*p, p), p = mask patch / 32."""
        x = self.net.stem(images)  # (B, C1, H/4, W/4)
        recompute = self.training and self.grad_checkpointing != "none"
        for stage in self.net.stages:
            x = stage.downsample(x)
            seen = mask.at(x.shape[2] // mask.grid[0]).to(x.dtype)  # (B, 1, H, W)
            for block in stage.blocks:
                run = partial(self.run_masked_block, block, seen=seen, grn_scope=self.grn_scope)
                x = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
        return pack(self.net.norm_pre(x), mask)


def as_dense(model: FCMAE) -> FCMAE:
    """The same model with a copy of its weights and the masked dense encoder; `model` is left as it is."""
    parts = copy.deepcopy(model)
    encoder = MaskedDenseEncoder(
        parts.encoder.net,
        grn_scope=parts.encoder.grn_scope,
        grad_checkpointing=parts.encoder.grad_checkpointing,
    )
    parts.decoder.engine = PLAIN
    dense = MaskedDenseFCMAE(encoder=encoder, decoder=parts.decoder, masking=parts.masking, target=parts.target)
    return dense.train(model.training)


def compiled_masked_block() -> Callable[..., Tensor]:
    """The dense block through torch.compile, one graph for all blocks of a stage, as `compiled_block` is for ours."""
    return torch.compile(_masked_block, dynamic=False, fullgraph=True)


def _masked_block(block: Any, x: Tensor, seen: Tensor, grn_scope: GRNScope) -> Tensor:
    """One ConvNeXt block, V1 or V2: (B, C, H, W) -> (B, C, H, W); hidden positions of the result mean nothing."""
    y = block.conv_dw(_times(x, seen))
    y = _times(y, seen)
    if not block.use_conv_mlp:  # timm's small sizes have 1x1 convolutions, the others linear layers
        y, seen = y.permute(0, 2, 3, 1), seen.permute(0, 2, 3, 1)  # (B, H, W, C)
    y = block.mlp.act(block.mlp.fc1(block.norm(y)))  # 4C channels
    if hasattr(block.mlp, "grn"):  # V1 has none
        y = _masked_grn(block.mlp.grn, y, seen, grn_scope)
    y = block.mlp.fc2(y)
    if not block.use_conv_mlp:
        y = y.permute(0, 3, 1, 2)  # (B, C, H, W)
    if block.gamma is not None:
        y = y * block.gamma.view(1, -1, 1, 1)
    return x + block.drop_path(y)


def _masked_grn(grn: Any, x: Tensor, seen: Tensor, scope: GRNScope) -> Tensor:
    """GRN whose norms are over the visible positions; x in whatever layout timm's module works on."""
    x = _times(x, seen)
    axes = grn.spatial_dim if scope == "image" else (0, *grn.spatial_dim)
    statistics = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=axes, keepdim=True, dtype=statistics)
    weight, bias = grn.weight.view(grn.wb_shape), grn.bias.view(grn.wb_shape)
    scale = 1 + weight * (norm / (norm.mean(dim=grn.channel_dim, keepdim=True) + grn.eps))
    return torch.addcmul(bias.to(x.dtype), x, scale.to(x.dtype))


def _times(x: Tensor, seen: Tensor) -> Tensor:
    return x * seen.to(x.dtype)  # autocast changes the type of x within a block
