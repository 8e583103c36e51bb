"""What an engine is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fcmae.errors import UserError
from fcmae.masking import Mask


class Depthwise(Protocol):
    """A depthwise convolution: x (B, C, V*p, p), weight (C, 1, k, k), bias (C,) or None -> (B, C, V*p, p)."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Mask) -> Tensor: ...


class GeluGRNLinear(Protocol):
    """The second half of a block's MLP: a linear layer of GRN (paper section 4) of GELU(x), the norms over N.

    x (B, N, C), GRN's weight and bias (C,), the layer's weight (D, C) and bias (D,) or None -> (B, N, D); given
    rows (B, n), distinct, the linear layer is applied to those alone -> (B, n, D).
    """

    def __call__(
        self,
        x: Tensor,
        grn_weight: Tensor,
        grn_bias: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Engine:
    """One way to compute what ConvNeXt's stock layers cannot do, or do slowly, on packed images.

    Attributes:
        name: as in the configuration.
        depthwise: the depthwise convolution, the only operation that must know the mask.
        gelu_grn_linear: activation, response normalisation and linear layer, with little kept for the backward pass.
        device: the only type of device that it works on, if there is but one.
    """

    name: str
    depthwise: Depthwise
    gelu_grn_linear: GeluGRNLinear
    device: str | None = None

    def check_device(self, device: torch.device) -> None:
        """Raises UserError if it does not work on `device`."""
        if self.device is not None and device.type != self.device:
            raise UserError(
                f"engine={self.name!r} works on {self.device} alone, the images are on {device.type}: use engine='auto'"
            )

    def __deepcopy__(self, memo: object) -> "Engine":
        return self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        from fcmae.engines import get_engine  # in another process it is the engine of that name

        return get_engine, (self.name,)
