"""Engine `torch`: unpack to the full map with zeros at hidden places, convolve densely, pack again.

Works on every device without a compiler, and is what the other engines are checked against.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.engines.engine import Engine
from fcmae.engines.grn import GeluGRN, gelu_grn_linear, grn_scale, grn_scale_backward
from fcmae.masking import Mask
from fcmae.packing import pack, unpack


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Mask) -> Tensor:
    """Depthwise convolution over the visible neighbours of each visible position (a submanifold convolution).

    Args:
        x: (B, C, V*p, p), a packed image.
        weight: (C, 1, k, k), k odd.
        bias: (C,) or None.
        mask: what is visible.

    Returns:
        (B, C, V*p, p). Positions outside the image and in hidden patches count as zeros.
    """
    if x.shape[3] == 1 and mask.visible_patches == mask.patches:  # an ordinary image, as in the decoder
        full = x.reshape(*x.shape[:2], *mask.grid)
        return F.conv2d(full, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0]).view(x.shape)
    full = unpack(x, mask)  # (B, C, h*p, w*p)
    full = F.conv2d(full, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    packed = pack(full, mask)  # (B, C, V*p, p)
    # The bias waits until here: its gradient over the full map costs the CPU a fifth of the convolution's backward.
    return packed if bias is None else packed + bias.to(packed.dtype).view(-1, 1, 1)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(F.gelu(x), dim=1, dtype=torch.promote_types(x.dtype, torch.float32))


def _output(x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addcmul(bias.to(x.dtype), F.gelu(x), grn_scale(norm, weight).to(x.dtype)[:, None])


def _backward(grad: Tensor, x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h, scale = F.gelu(x), grn_scale(norm, weight).to(x.dtype)[:, None]
    of_weight, per_h = grn_scale_backward((grad * h).sum(1, dtype=norm.dtype), norm, weight)
    of_bias = grad.sum((0, 1), dtype=norm.dtype)
    grad.mul_(scale).addcmul_(h, per_h.to(x.dtype)[:, None])  # of h
    grad.copy_(torch.ops.aten.gelu_backward(grad, x))
    return torch.addcmul(bias.to(x.dtype), h, scale), of_weight.to(weight.dtype), of_bias.to(bias.dtype)


GELU_GRN = GeluGRN(_norm, _output, _backward)


def engine() -> Engine:
    """This engine; there is nothing that it could lack."""
    return Engine("torch", depthwise, partial(gelu_grn_linear, GELU_GRN))
