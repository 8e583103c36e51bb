"""timm's ConvNeXt block, run with its own parameters but with a depthwise convolution of our choice.

Shapes: x (B, C, H, W), a packed or an ordinary image; inside the block (B, H, W, C), a view of channels-last memory.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

GRNScope = Literal["image", "batch"]


def convnext_block(
    block: ConvNeXtBlock,
    x: Tensor,
    depthwise: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    grn_scope: GRNScope = "image",
) -> Tensor:
    """One ConvNeXt block, V1 or V2 (paper appendix A, figure 8): (B, C, H, W) -> (B, C, H, W)."""
    y = depthwise(x, block.conv_dw.weight, block.conv_dw.bias)
    y = y.permute(0, 2, 3, 1)  # (B, H, W, C)
    y = F.layer_norm(y, block.norm.normalized_shape, block.norm.weight, block.norm.bias, block.norm.eps)
    y = block.mlp.act(_linear(block.mlp.fc1, y))  # (B, H, W, 4C)
    grn = getattr(block.mlp, "grn", None)  # V1 has none
    if grn is not None:
        y = global_response_norm(y, grn.weight, grn.bias, grn_scope)
    y = _linear(block.mlp.fc2, y)  # (B, H, W, C)
    if block.gamma is not None:
        y = y * block.gamma
    return x + block.drop_path(y.permute(0, 3, 1, 2))


def global_response_norm(x: Tensor, weight: Tensor, bias: Tensor, scope: GRNScope = "image") -> Tensor:
    """GRN (paper section 4, equations 1 to 3), its statistics in float32 at least: (B, H, W, C) -> (B, H, W, C).

    Args:
        x: (B, H, W, C). A packed image holds just the visible positions, so its norms are over those alone.
        weight: (C,), gamma.
        bias: (C,), beta.
        scope: `image` takes a channel's norm over the positions of one image; `batch` over those of the whole batch,
            as the original's sparse PyTorch code does.
    """
    shape = x.shape
    if scope == "batch":
        x = x.flatten(0, 1)[None]  # (1, B*H, W, C): the batch becomes one tall image
    statistics = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=statistics)  # (B, 1, 1, C)
    scale = 1 + weight * (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6))
    return torch.addcmul(bias.to(x.dtype), x, scale.to(x.dtype)).view(shape)


def initialize(module: nn.Module) -> None:
    """Truncated normal of deviation 0.02 for kernels and matrices, zero for their biases (paper table 8).

    Cut at five deviations: with the usual bounds of +-2 some samplers return, about once in ten million draws, the
    bound itself, a hundred deviations out.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.1, b=0.1)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _linear(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    # timm's small sizes have 1x1 convolutions here; they differ from linear layers by two axes of length 1.
    return F.linear(x, layer.weight.flatten(1), layer.bias)
