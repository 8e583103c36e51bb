"""The second half of a ConvNeXt V2 block's MLP, GELU -> GRN -> linear, with little kept for the backward pass.

GRN (paper section 4, equations 1 to 3) of h = GELU(x): with n the norm of h over the positions of an image,

    y = scale * h + bias,    scale = 1 + weight * n / (mean of n over the channels + 1e-6)

Autograd would keep x, h, y and more. Here only x and n are kept: h and y cost one pass over x to have again.

Shapes: B images, N positions of an image, C channels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.errors import UserError
from fcmae.packing import take_rows


class GeluGRN(NamedTuple):
    """GELU and GRN, as an engine computes them, without autograd. Norms are in float32 at least."""

    norm: Callable[[Tensor], Tensor]
    """x (B, N, C) -> n (B, C)."""
    output: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """x, n, weight (C,), bias (C,) -> y (B, N, C)."""
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """The gradient of y (B, N, C), x, n, weight, bias -> y again, the gradients of weight and bias.

    Puts the gradient of x in the place of that of y: a large tensor less, and the memory is warm."""


def gelu_grn_linear(
    gelu_grn: GeluGRN,
    x: Tensor,
    grn_weight: Tensor,
    grn_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None = None,
) -> Tensor:
    """x (B, N, C), GRN's weight and bias (C,), the linear layer's weight (D, C) and bias (D,) -> (B, N, D).

    Given rows (B, n), distinct, all positions take part in the norms as ever, but the linear layer is applied to those
    alone: (B, n, D).
    """
    if grn_weight.shape != x.shape[2:] or grn_bias.shape != x.shape[2:] or not x.is_floating_point():
        raise UserError(
            f"GRN's weight {tuple(grn_weight.shape)} and bias {tuple(grn_bias.shape)} must be ({x.shape[2]},), and x "
            f"real numbers; it is {x.dtype}"
        )
    y: Tensor = _GeluGRNLinear.apply(gelu_grn, autocast(x).contiguous(), grn_weight, grn_bias, weight, bias, rows)
    return y


class _GeluGRNLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gelu_grn: GeluGRN,
        x: Tensor,
        grn_weight: Tensor,
        grn_bias: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
    ) -> Tensor:
        norm = gelu_grn.norm(x)
        ctx.save_for_backward(x, norm, grn_weight, grn_bias, weight, rows)
        ctx.gelu_grn, ctx.bias_dtype = gelu_grn, None if bias is None else bias.dtype
        y = gelu_grn.output(x, norm, grn_weight, grn_bias)
        return F.linear(y if rows is None else take_rows(y, rows), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, grn_weight, grn_bias, weight, rows = ctx.saved_tensors
        flat = grad.flatten(0, 1)  # (B*n, D)
        of_bias = None if ctx.bias_dtype is None else flat.sum(0, dtype=norm.dtype).to(ctx.bias_dtype)
        of_x = (flat @ weight.to(grad.dtype)).view(len(x), -1, x.shape[2])  # at first of y
        if rows is not None:
            of_x = torch.zeros_like(x).scatter_(1, rows[:, :, None].expand_as(of_x), of_x)
        y, *of_grn = ctx.gelu_grn.backward(of_x, x, norm, grn_weight, grn_bias)
        y = y if rows is None else take_rows(y, rows)
        of_weight = (flat.t() @ y.flatten(0, 1)).to(weight.dtype)
        return None, of_x, *of_grn, of_weight, of_bias, None


def grn_scale(norm: Tensor, weight: Tensor) -> Tensor:
    """What GRN multiplies with: norm (B, C), weight (C,) -> (B, C)."""
    return 1 + weight * (norm / (norm.mean(-1, keepdim=True) + 1e-6))


def grn_scale_backward(product: Tensor, norm: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The way back through `grn_scale` and the norm.

    Args:
        product: (B, C), the gradient of the scale: the sum over N of (gradient of y * h).
        norm: (B, C), of h over N.
        weight: (C,).

    Returns:
        The gradient of weight (C,), and a factor (B, C): h times it is what the norms add to the gradient of h.
    """
    mean = norm.mean(-1, keepdim=True) + 1e-6  # (B, 1)
    of_ratio = product * weight
    of_norm = of_ratio / mean - (of_ratio * norm).sum(-1, keepdim=True) / (mean * mean * norm.shape[-1])
    return (product * norm / mean).sum(0), torch.where(norm > 0, of_norm / norm, 0)


def autocast(x: Tensor) -> Tensor:
    """x in the type that autocast asks for, as before a linear layer; float64 it leaves alone."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x
