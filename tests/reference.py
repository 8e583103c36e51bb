"""The method a second time, as simple as it can be said: the masked *dense* network in plain torch.

Nothing here is shared with the package, so agreement means something. A state dict in the package's names goes in;
every operation runs on the full map, which is multiplied by the mask wherever hidden places could leak in.

Shapes: B images, C channels, (H, W) pixels, p mask patch side in pixels, L patches of which V are seen.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


class Reference(NamedTuple):
    features: Tensor
    """(B, C4, V*p/32, p/32): the seen patches of the last stage, cut out and stacked."""
    pred: Tensor | None
    """(B, L, p*p*C); None where the state dict has no decoder."""
    loss: Tensor | None


def masked_dense_fcmae(
    state: State, images: Tensor, visible: Tensor, *, grn_scope: str = "image", norm_pix_loss: bool = True
) -> Reference:
    """images (B, C, H, W), visible (B, h, w) bool."""
    patch_size = images.shape[2] // visible.shape[1]
    dense = dense_encoder(part(state, "encoder.net."), images, visible, grn_scope)
    features = cut_out(dense, visible)
    if "decoder.pred.weight" not in state:
        return Reference(features, None, None)

    pred = dense_decoder(part(state, "decoder."), dense, visible)  # (B, 32*32*C, H/32, W/32)
    by_channel = pred.unflatten(1, (32 * 32, -1)).transpose(1, 2).flatten(1, 2)  # channel is now (colour, row, column)
    pred = patches(F.pixel_shuffle(by_channel, 32), patch_size)  # (B, L, C, p*p)
    target = patches(images, patch_size)
    if norm_pix_loss:
        flat = target.flatten(2)  # (B, L, C*p*p)
        variance = flat.var(dim=2, unbiased=True)[:, :, None, None]
        target = (target - flat.mean(2)[:, :, None, None]) / (variance + 1e-6).sqrt()
    errors = (pred - target).square().flatten(2).mean(2)  # (B, L)
    return Reference(features, pred.transpose(2, 3).flatten(2), errors[~visible.flatten(1)].mean())


def dense_encoder(state: State, images: Tensor, visible: Tensor, grn_scope: str) -> Tensor:
    """-> (B, C4, H/32, W/32), zero where hidden."""
    x = F.conv2d(images, state["stem.0.weight"], state["stem.0.bias"], stride=4)
    x = layer_norm(x, part(state, "stem.1."))
    x = x * at_resolution(visible, x)
    for stage in range(4):
        if stage:
            x = layer_norm(x, part(state, f"stages.{stage}.downsample.0."))
            down = part(state, f"stages.{stage}.downsample.1.")
            x = F.conv2d(x, down["weight"], down["bias"], stride=2)
            x = x * at_resolution(visible, x)
        x = blocks(x, part(state, f"stages.{stage}.blocks."), at_resolution(visible, x), grn_scope)
    return x


def dense_decoder(state: State, x: Tensor, visible: Tensor) -> Tensor:
    seen = at_resolution(visible, x)
    x = F.conv2d(x, state["proj.weight"], state["proj.bias"])
    x = x * seen + state["mask_token"] * (1 - seen)
    x = blocks(x, part(state, "blocks."), torch.ones_like(seen), "image")
    return F.conv2d(x, state["pred.weight"], state["pred.bias"])


def blocks(x: Tensor, state: State, seen: Tensor, grn_scope: str) -> Tensor:
    """ConvNeXt V2 blocks on (B, C, H, W); `seen` (B, 1, H, W) is 1 where something may be known, else 0."""
    for number in range(len({name.split(".")[0] for name in state})):
        block = part(state, f"{number}.")
        weight = block["conv_dw.weight"]
        y = F.conv2d(x * seen, weight, block["conv_dw.bias"], padding=weight.shape[2] // 2, groups=x.shape[1]) * seen
        y = layer_norm(y, part(block, "norm."))
        y = gelu(linear(y, part(block, "mlp.fc1.")))
        norm = (y * seen).square().sum(dim=(0, 2, 3) if grn_scope == "batch" else (2, 3), keepdim=True).sqrt()
        response = norm / (norm.mean(dim=1, keepdim=True) + 1e-6)
        y = vector(block["mlp.grn.weight"]) * (y * response) + vector(block["mlp.grn.bias"]) + y
        x = (x + linear(y, part(block, "mlp.fc2."))) * seen
    return x


def layer_norm(x: Tensor, state: State) -> Tensor:
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * vector(state["weight"]) + vector(state["bias"])


def linear(x: Tensor, state: State) -> Tensor:
    weight = state["weight"].reshape(state["weight"].shape[0], -1)
    return torch.einsum("oc,bchw->bohw", weight, x) + vector(state["bias"])


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def vector(x: Tensor) -> Tensor:
    return x.reshape(1, -1, 1, 1)


def part(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def at_resolution(visible: Tensor, x: Tensor) -> Tensor:
    """(B, h, w) bool -> (B, 1, H, W) ones and zeros of x's resolution and type."""
    return F.interpolate(visible[:, None].to(x.dtype), size=x.shape[2:], mode="nearest")


def patches(images: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, L, C, size*size)."""
    return F.unfold(images, size, stride=size).transpose(1, 2).unflatten(2, (images.shape[1], -1))


def cut_out(x: Tensor, visible: Tensor) -> Tensor:
    """(B, C, h*p, w*p) -> (B, C, V*p, p), patch by patch, row by row."""
    p = x.shape[2] // visible.shape[1]
    stacked = []
    for image, seen in zip(x, visible, strict=True):
        cells = [image[:, r * p : (r + 1) * p, c * p : (c + 1) * p] for r, c in seen.nonzero().tolist()]
        stacked.append(torch.cat(cells, dim=1))
    return torch.stack(stacked)
