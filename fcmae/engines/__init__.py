"""Engines: the ways to compute a depthwise convolution on packed images, the only operation that must know the mask.

All share the parameters and give the same numbers. One engine is one file with one function.
"""

from typing import Protocol

from torch import Tensor

from fcmae.errors import UserError
from fcmae.masking import Mask


class Depthwise(Protocol):
    """A depthwise convolution: x (B, C, V*p, p), weight (C, 1, k, k), bias (C,) or None -> (B, C, V*p, p)."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Mask) -> Tensor: ...


NAMES = ("torch",)


def get_engine(name: str) -> Depthwise:
    """The depthwise convolution of the engine called `name`.

    Raises:
        UserError: there is no such engine.
    """
    if name == "torch":
        from fcmae.engines.torch import depthwise

        return depthwise
    raise UserError(f"engine={name!r} is unknown: use {' or '.join(map(repr, NAMES))}")
