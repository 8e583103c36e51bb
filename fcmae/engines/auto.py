"""Engine `auto`: on each device the fastest of the others that works there, chosen by rule, not by timing."""

import logging
import threading

import torch
from torch import Tensor

from fcmae.engines.check import errors
from fcmae.engines.engine import Engine
from fcmae.errors import in_a_line
from fcmae.masking import Mask

log = logging.getLogger(__name__)

FASTEST = {"cuda": "triton", "cpu": "cpu"}  # by type of device; on others, torch
TOLERANCE = 1e-4  # of the first test; float32 stays below 1e-6
_LOCK = threading.Lock()
_CHOSEN: dict[str, Engine] = {}  # a cache, which torch.compile can read where it could not run `choose`


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Mask) -> Tensor:
    """The chosen engine's depthwise convolution."""
    return _chosen(x.device.type).depthwise(x, weight, bias, mask)


def gelu_grn_linear(
    x: Tensor,
    grn_weight: Tensor,
    grn_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None = None,
) -> Tensor:
    """The chosen engine's second half of an MLP."""
    return _chosen(x.device.type).gelu_grn_linear(x, grn_weight, grn_bias, weight, bias, rows)


@torch.compiler.assume_constant_result
def choose(device: str) -> str:
    """The name of the engine for a type of device (`cuda`, `cpu`, ...): the fastest, or `torch` where that fails.

    The first call in a process tries it on a small batch; if it fails, a warning says why.
    """
    with _LOCK:
        if device not in _CHOSEN:
            _CHOSEN[device] = _first_that_works(device)
    return _CHOSEN[device].name


def _chosen(device: str) -> Engine:
    choose(device)
    return _CHOSEN[device]


def _first_that_works(device: str) -> Engine:
    from fcmae.engines import get_engine

    if device not in FASTEST:
        return get_engine("torch")
    name = FASTEST[device]
    try:
        engine = get_engine(name)
        # Whatever the caller is about: evaluation, inference, autocast.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            worst = max(errors(engine, device).values())
        if not worst <= TOLERANCE:
            raise RuntimeError(f"its results are off by {worst:.1e}")
    except Exception as error:  # whatever a compiler or a driver may come up with, training goes on without it
        log.warning("engine 'torch' is used on %s instead of %r: %s", device, name, in_a_line(error))
        return get_engine("torch")
    return engine


def engine() -> Engine:
    """This engine; it always works."""
    return Engine("auto", depthwise, gelu_grn_linear)
