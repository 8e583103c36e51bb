"""timm's ConvNeXt block, run with its own parameters but with an engine's convolution and activation.

Shapes: x (B, C, H, W), a packed or an ordinary image; inside the block (B, H, W, C), a view of channels-last memory.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import GELU
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fcmae.engines import Engine
from fcmae.engines.grn import grn_scale
from fcmae.masking import Mask
from fcmae.packing import take_rows

GRNScope = Literal["image", "batch"]
Recompute = Literal["none", "mlp", "block"]


def convnext_block(
    block: Any,  # timm's ConvNeXtBlock
    x: Tensor,
    engine: Engine,
    mask: Mask,
    *,
    grn_scope: GRNScope = "image",
    recompute: Recompute = "none",
    rows: Tensor | None = None,
) -> Tensor:
    """One ConvNeXt block, V1 or V2 (paper appendix A, figure 8), on a packed image: (B, C, V*p, p) -> the same.

    What is to be recomputed is not kept for the backward pass. Given rows (B, n), the result is wanted at those of the
    V*p*p positions alone: (B, C, n, 1).
    """
    if recompute == "block":
        return checkpoint(convnext_block, block, x, engine, mask, grn_scope=grn_scope, rows=rows, use_reentrant=False)
    y = engine.depthwise(x, block.conv_dw.weight, block.conv_dw.bias, mask)
    y = y.permute(0, 2, 3, 1)  # (B, H, W, C)
    y = layer_norm(block.norm, y)
    if recompute == "mlp":
        y = checkpoint(_mlp, block.mlp, y, engine, grn_scope, rows, use_reentrant=False)
    else:
        y = _mlp(block.mlp, y, engine, grn_scope, rows)
    if rows is not None:
        x = take_rows(x.flatten(2).transpose(1, 2), rows).transpose(1, 2)[..., None]  # (B, C, n, 1)
    if block.gamma is not None:
        y = y * block.gamma
    return x + block.drop_path(y.permute(0, 3, 1, 2))


def compiled_block(backend: str | Callable[..., Any] = "inductor") -> Callable[..., Tensor]:
    """`convnext_block` through torch.compile, for static shapes: one graph serves all blocks of a stage.

    A network of four stages and a decoder takes five; with drop path each block has its own rate, and graph.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(convnext_block, dynamic=False, fullgraph=True, backend=backend)


def _mlp(mlp: Any, x: Tensor, engine: Engine, scope: GRNScope, rows: Tensor | None) -> Tensor:
    """(B, H, W, C) -> (B, H, W, C), or (B, n, 1, C) given rows (B, n).

    A packed image holds just the visible positions, so GRN's norms are over those alone: with scope `image` over those
    of one image, with `batch` over those of all, as in the original's sparse PyTorch code.
    """
    assert rows is None or scope == "image", "rows are those of an image"
    shape = x.shape if rows is None else (*rows.shape, 1, x.shape[3])
    h = linear(mlp.fc1, x.flatten(0, 2)[None] if scope == "batch" else x.flatten(1, 2))  # (B or 1, N, 4C)
    grn = getattr(mlp, "grn", None)  # V1 has none
    if grn is not None and isinstance(mlp.act, GELU):
        y = engine.gelu_grn_linear(h, grn.weight, grn.bias, mlp.fc2.weight.flatten(1), mlp.fc2.bias, rows)
    else:
        h = mlp.act(h)
        h = h if grn is None else global_response_norm(h, grn.weight, grn.bias)
        y = linear(mlp.fc2, h if rows is None else take_rows(h, rows))
    return y.view(shape)


def global_response_norm(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GRN (paper section 4, equations 1 to 3), its statistics in float32 at least: (B, N, C) -> (B, N, C)."""
    norm = torch.linalg.vector_norm(h, dim=1, dtype=torch.promote_types(h.dtype, torch.float32))  # (B, C)
    return torch.addcmul(bias.to(h.dtype), h, grn_scale(norm, weight).to(h.dtype)[:, None])


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm over the last axis, in the type of x; torch sums in float32 whatever that is.

    On CUDA, though not on the CPU, autocast would compute, and keep, all of it in float32.
    """
    if not x.is_cuda:
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    with torch.autocast("cuda", enabled=False):  # its kernel wants one type for all
        return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def linear(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """A linear layer on the last axis; a 1x1 convolution is one too: (..., C) -> (..., D)."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


def patch_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of stem or downsampling: a LayerNorm over the channels, or a convolution.

    A convolution is computed as the linear layer per patch that it is.
    Its kernel is its stride, so each output sees a patch of its own. torch's convolutions take several times as long
    on the CPU, above all backward and in bfloat16.
    """
    if isinstance(layer, nn.LayerNorm):
        return layer_norm(layer, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if not isinstance(layer, nn.Conv2d):
        return layer(x)
    k = layer.stride[0]
    batch, channels, height, width = x.shape
    patches = x.permute(0, 2, 3, 1).view(batch, height // k, k, width // k, k, channels).transpose(2, 3)
    weight = layer.weight.permute(0, 2, 3, 1).flatten(1)  # (D, k*k*C)
    return F.linear(patches.flatten(3), weight, layer.bias).permute(0, 3, 1, 2)  # (B, D, H/k, W/k)
