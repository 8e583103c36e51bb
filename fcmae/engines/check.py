"""Does an engine compute what engine `torch` computes? Outputs and every gradient, on a masked batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fcmae.engines import torch as torch_engine
from fcmae.engines.engine import Engine
from fcmae.masking import Mask


def errors(engine: Engine, device: torch.device | str, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """The largest difference of each result, relative to the largest element of what engine `torch` gives in float64.

    Two images of 4x5 patches, 7 of them visible, 8x8 positions each, 40 channels: what the first stage of `atto` sees.
    """
    numbers = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=numbers, device="cpu").to(dtype).to(device)

    mask = _mask(2, 4, 5, 7, numbers).to(device)
    convolution = {"x": random(2, 40, 7 * 8, 8), "weight": random(40, 1, 7, 7) / 7, "bias": random(40)}
    mlp = {"x": random(2, 7 * 64, 160), "grn_weight": random(160), "grn_bias": random(160)}
    mlp |= {"weight": random(40, 160) / 13, "bias": random(40)}
    return {
        **_compare("depthwise", engine.depthwise, torch_engine.depthwise, convolution, mask=mask),
        **_compare("gelu_grn_linear", engine.gelu_grn_linear, torch_engine.engine().gelu_grn_linear, mlp),
    }


def _compare(
    name: str, ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: dict[str, Tensor], **other: Any
) -> dict[str, float]:
    results = _results(partial(ours, **other), inputs)
    expected = _results(partial(theirs, **other), {key: x.double() for key, x in inputs.items()})
    return {
        f"{name}: {key}": float((results[key].double() - b).abs().max() / b.abs().max()) for key, b in expected.items()
    }


def _results(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    output = function(**inputs)
    numbers = torch.Generator("cpu").manual_seed(1)
    weights = torch.randn(output.shape, generator=numbers, device="cpu").to(output)
    gradients = torch.autograd.grad((output * weights).sum(), list(inputs.values()))
    return {"output": output.detach()} | {f"gradient of {n}": g for n, g in zip(inputs, gradients, strict=True)}


def _mask(batch: int, h: int, w: int, seen: int, numbers: torch.Generator) -> Mask:
    index = torch.rand(batch, h * w, generator=numbers, device="cpu").argsort(1)[:, :seen]
    visible = torch.zeros(batch, h * w, dtype=torch.bool, device="cpu").scatter_(1, index, True)
    return Mask(visible.view(batch, h, w))
