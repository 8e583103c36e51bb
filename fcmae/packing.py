"""How visible patches are laid out: stacked into a tall, narrow, dense image, the *packed image*.

Shapes: B images, C channels, (h, w) grid of patches, p positions per side of a patch at this depth of the network
(32 in the image, 8, 4, 2, 1 after the stages), V visible patches per image.
In memory a packed image is channels-last, that is the token tensor (B, V, p, p, C).
"""

from typing import Any

import torch
from torch import Tensor

from fcmae.errors import UserError
from fcmae.masking import Mask


def pack(x: Tensor, mask: Mask) -> Tensor:
    """(B, C, h*p, w*p) -> (B, C, V*p, p): keeps the visible patches, in the order of `mask.index`.

    Raises:
        UserError: batch or sides do not fit the mask's grid.
    """
    h, w = mask.grid
    if x.shape[0] != mask.visible.shape[0] or x.shape[2] % h or x.shape[3] % w or x.shape[2] * w != x.shape[3] * h:
        raise UserError(
            f"a batch of {x.shape[0]} of size {x.shape[2]}x{x.shape[3]} does not fit the mask's "
            f"{mask.visible.shape[0]} grids of {h}x{w} square patches"
        )
    packed: Tensor = _Pack.apply(x, mask.index, h, w)
    return packed


def unpack(x: Tensor, mask: Mask) -> Tensor:
    """(B, C, V*p, p) -> (B, C, h*p, w*p): the inverse of `pack`, with zeros where a patch is hidden."""
    unpacked: Tensor = _Unpack.apply(x, mask.index, *mask.grid)
    return unpacked


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Some of the N rows of each image, such as positions or patches: x (B, N, C), rows (B, n) -> (B, n, C)."""
    return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))


def _gather(x: Tensor, index: Tensor, h: int, w: int) -> Tensor:
    batch, channels, height, _ = x.shape
    p = height // h
    image = torch.arange(batch, device=x.device)[:, None]
    patches = x.permute(0, 2, 3, 1).reshape(batch, h, p, w, p, channels)
    tokens = patches[image, index // w, :, index % w]  # (B, V, p, p, C)
    # Indexing a channels-first image leaves the tokens in its order; in channels-last memory this copies nothing.
    return tokens.flatten(1, 2).contiguous().permute(0, 3, 1, 2)  # (B, C, V*p, p)


def _scatter(x: Tensor, index: Tensor, h: int, w: int) -> Tensor:
    batch, channels, _, p = x.shape
    image = torch.arange(batch, device=x.device)[:, None]
    tokens = x.permute(0, 2, 3, 1).reshape(batch, index.shape[1], p, p, channels)
    patches = x.new_zeros(batch, h, p, w, p, channels)
    patches[image, index // w, :, index % w] = tokens
    return patches.view(batch, h * p, w * p, channels).permute(0, 3, 1, 2)  # (B, C, h*p, w*p)


# Packing and unpacking are each other's adjoint. Saying so spares autograd an accumulating scatter, which is slow, and
# on a GPU not even deterministic.


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, h: int, w: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.grid = h, w
        return _gather(x, index, h, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Unpack.apply(grad, *ctx.saved_tensors, *ctx.grid), None, None, None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, h: int, w: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.grid = h, w
        return _scatter(x, index, h, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Pack.apply(grad, *ctx.saved_tensors, *ctx.grid), None, None, None
