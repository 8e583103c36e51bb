"""How much arithmetic a step is, and how much of it the device can do in a second.

What is counted: two operations per multiply-add of matrix products and convolutions, forward and backward, that the
method asks of a variant: at visible positions for ours, at all of them for `dense`. A depthwise convolution has k*k
per position and channel at which its output is wanted, wherever the taps fall and however an engine computes it, so all
engines are credited with the same work. Not counted: normalisation, activation, loss, optimiser, and what gradient
checkpointing computes twice.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fcmae.benchmark.conditions import Conditions
from fcmae.benchmark.dense import MaskedDenseFCMAE
from fcmae.engines import Engine
from fcmae.engines import torch as torch_engine
from fcmae.masking import Mask
from fcmae.models.fcmae import FCMAE


def flop_per_step(variant: FCMAE, images: Tensor) -> int:
    """Operations of forward and backward on images (B, C, H, W).

    Args:
        variant: on the device `meta`, where tensors have shapes and no numbers; is changed.
        images: on the device `meta`.
    """
    variant.encoder.engine = variant.decoder.engine = _COUNTED
    variant.encoder.grad_checkpointing = "none"
    aten = torch.ops.aten
    formulas = {aten.convolution: _convolution, aten.convolution_backward: _convolution_backward}
    mask = variant.masking(images)
    whole = Mask.everything(len(images), *mask.grid, device=images.device)
    wanted = whole if isinstance(variant, MaskedDenseFCMAE) else mask.hidden
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        # The loss, which has no products, is left out: there is no autocast to turn off on `meta`.
        variant.decoder(variant.encoder(images, mask), mask, wanted).sum().backward()
    return counter.get_total_flops()


def matmul_peak(conditions: Conditions) -> float:
    """Operations per second of a large square matrix product: the most that this device reached here, now.

    In the same precision, on the same device, with the same threads and by the same clock as the steps; the best of
    several products.
    """
    side = 8192 if conditions.on_cuda else 1024
    a, b = (torch.randn(side, side, device=conditions.device).to(conditions.dtype) for _ in range(2))
    product = torch.empty_like(a)
    seconds = [conditions.run(lambda: torch.mm(a, b, out=product)) for _ in range(8)]
    return 2 * side**3 / max(min(seconds), 1e-9)


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Mask) -> Tensor:
    # On `meta` only the shapes count, and these are the packed image's.
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


_COUNTED = Engine("counted", _depthwise, torch_engine.engine().gelu_grn_linear)


# torch's own formula for the backward pass takes a depthwise convolution for a full one. Arguments as in ATen.


def _convolution(x: Sequence[int], weight: Sequence[int], *_: object, out_shape: Sequence[int], **__: object) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _convolution_backward(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *others: object, **_: object
) -> int:
    of_x, of_weight, _of_bias = others[-1]  # type: ignore[misc]  # which gradients are wanted
    return 2 * math.prod(grad) * math.prod(weight[1:]) * (of_x + of_weight)  # type: ignore[has-type]
