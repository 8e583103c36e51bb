"""What engines with kernels of their own share: custom operators that torch.compile and autograd know.

An engine brings six functions (`Kernels`); here they become what an `Engine` is made of.

Shapes: B images, V visible patches, p positions per side of a patch, C channels, k taps per side of the kernel,
(h, w) grid of patches, N positions of an image.
"""

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fcmae.engines.engine import Engine
from fcmae.engines.grn import GeluGRN, autocast, gelu_grn_linear, grn_scale, grn_scale_backward
from fcmae.errors import UserError
from fcmae.masking import Mask


class Kernels(Protocol):
    """What an engine computes by itself, without autograd. All tensors are contiguous.

    Sums are in float32 (float64 for float64 inputs), and so are `taps` and `bias` and what is marked (sums).
    """

    def convolve(self, tokens: Tensor, taps: Tensor, bias: Tensor | None, index: Tensor, slots: Tensor) -> Tensor:
        """The convolution of tokens (B, V, p, p, C) with taps (k*k, C), row by row, and bias (C,): like tokens.

        index (B, V) int64 and slots (B, h, w) int32 are those of a `Mask`.
        """
        ...

    def weight_gradient(
        self, tokens: Tensor, grad: Tensor, index: Tensor, slots: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Gradients of taps (k*k, C) and bias (C,) (sums) for grad (B, V, p, p, C), the output's gradient."""
        ...

    def gelu_squares(self, x: Tensor) -> Tensor:
        """The sums (B, C) over N of the squares of GELU(x), x (B, N, C) (sums)."""
        ...

    def gelu_scale(self, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        """GELU(x) * scale + bias: x (B, N, C), scale (B, C) and bias (C,) (sums) -> (B, N, C)."""
        ...

    def gelu_products(self, grad: Tensor, x: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output of `gelu_scale` again, and the sums (B, C) over N of grad * GELU(x) and of grad (sums)."""
        ...

    def gelu_scale_backward_(self, grad: Tensor, x: Tensor, scale: Tensor, per_h: Tensor) -> None:
        """Replaces grad by GELU'(x) * (grad * scale + GELU(x) * per_h).

        grad and x are (B, N, C), scale and per_h (B, C) (sums).
        """
        ...


def build_engine(name: str, kernels: Kernels, device: str | None = None) -> Engine:
    """Registers the operators `fcmae::<name>_...`; an engine's file calls it once.

    `device` is the type of device that the kernels work on, if there is but one.

    Differentiating twice is refused by torch, which says that the backward operator has no formula of its own.
    """
    return Engine(name, _depthwise(name, kernels), _gelu_grn_linear(name, kernels), device)


def _depthwise(name: str, kernels: Kernels) -> Any:
    @torch.library.custom_op(f"fcmae::{name}_depthwise", mutates_args=())
    def forward(tokens: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, slots: Tensor) -> Tensor:
        bias = None if bias is None else bias.to(sums(tokens.dtype)).contiguous()
        return kernels.convolve(tokens, _taps(weight, tokens), bias, index, slots)

    @torch.library.custom_op(f"fcmae::{name}_depthwise_backward", mutates_args=())
    def backward(
        grad: Tensor, tokens: Tensor, weight: Tensor, index: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        taps = _taps(weight, tokens).flip(0)  # what a position gave to its neighbours, it gets back from them
        of_tokens = kernels.convolve(grad, taps, None, index, slots)
        of_taps, of_bias = kernels.weight_gradient(tokens, grad, index, slots, weight.shape[-1])
        of_weight = of_taps.t().reshape(weight.shape).to(weight.dtype)
        return of_tokens, of_weight.contiguous(), of_bias.to(weight.dtype)

    @forward.register_fake
    def _(tokens: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, slots: Tensor) -> Tensor:
        return torch.empty_like(tokens)

    @backward.register_fake
    def _(grad: Tensor, tokens: Tensor, weight: Tensor, index: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        return torch.empty_like(tokens), of_weight, weight.new_empty(weight.shape[0])

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tokens, weight, bias, index, slots = inputs
        ctx.save_for_backward(tokens, weight, index, slots)
        ctx.bias_dtype = None if bias is None else bias.dtype

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_tokens, of_weight, of_bias = backward(grad.contiguous(), *ctx.saved_tensors)
        return of_tokens, of_weight, None if ctx.bias_dtype is None else of_bias.to(ctx.bias_dtype), None, None

    forward.register_autograd(differentiate, setup_context=save)

    def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Mask) -> Tensor:
        _check(x, weight, bias, mask)
        x = autocast(x)
        batch, channels, _, p = x.shape
        tokens = x.permute(0, 2, 3, 1).reshape(batch, mask.index.shape[1], p, p, channels).contiguous()
        y: Tensor = forward(tokens, weight, bias, mask.index.contiguous(), mask.slots.contiguous())
        return y.flatten(1, 2).permute(0, 3, 1, 2)  # (B, C, V*p, p)

    return depthwise


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Mask) -> None:
    """Kernels read and write where the mask says; nothing would stop them from doing so elsewhere."""
    (batch, channels, height, p), (of_batch, patches) = x.shape, mask.index.shape
    if batch != of_batch or height != patches * p or mask.index.device != x.device:
        raise UserError(
            f"x {tuple(x.shape)} on {x.device} is not packed by this mask of {of_batch} x {patches} patches on "
            f"{mask.index.device}"
        )
    if weight.shape[:2] != (channels, 1) or weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        raise UserError(f"weight {tuple(weight.shape)} must be ({channels}, 1, k, k) with an odd k")
    if bias is not None and bias.shape != (channels,):
        raise UserError(f"bias {tuple(bias.shape)} must be ({channels},)")


def _gelu_grn_linear(name: str, kernels: Kernels) -> Any:
    @torch.library.custom_op(f"fcmae::{name}_gelu_norm", mutates_args=())
    def gelu_norm(x: Tensor) -> Tensor:
        return kernels.gelu_squares(x).sqrt_()

    @torch.library.custom_op(f"fcmae::{name}_gelu_grn", mutates_args=())
    def gelu_grn(x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight, bias = weight.to(norm.dtype), bias.to(norm.dtype).contiguous()
        return kernels.gelu_scale(x, grn_scale(norm, weight), bias)

    @torch.library.custom_op(f"fcmae::{name}_gelu_grn_backward", mutates_args=("grad",))
    def gelu_grn_backward(
        grad: Tensor, x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact, scale = weight.to(norm.dtype), grn_scale(norm, weight.to(norm.dtype))
        y, product, total = kernels.gelu_products(grad, x, scale, bias.to(norm.dtype).contiguous())
        of_weight, per_h = grn_scale_backward(product, norm, exact)
        kernels.gelu_scale_backward_(grad, x, scale, per_h)
        return y, of_weight.to(weight.dtype), total.sum(0).to(bias.dtype)

    @gelu_norm.register_fake
    def _(x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], x.shape[2], dtype=sums(x.dtype))

    @gelu_grn.register_fake
    def _(x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.empty_like(x)

    @gelu_grn_backward.register_fake
    def _(grad: Tensor, x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)

    return partial(gelu_grn_linear, GeluGRN(gelu_norm, gelu_grn, gelu_grn_backward))


def sums(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over values of `dtype` are taken."""
    return torch.promote_types(dtype, torch.float32)


def _taps(weight: Tensor, tokens: Tensor) -> Tensor:
    """(C, 1, k, k) -> (k*k, C)."""
    return weight.reshape(weight.shape[0], -1).t().to(sums(tokens.dtype)).contiguous()
