"""Engines: the ways to compute a depthwise convolution on packed images, the only operation that must know the mask,
and the activation that follows it.

All share the parameters and give the same numbers. One engine is one file.
"""

import importlib
import threading

from fcmae.engines.engine import Engine
from fcmae.errors import UserError

_LOCK = threading.Lock()
NAMES = ("auto", "torch", "cpu", "triton", "minkowski")


def get_engine(name: str) -> Engine:
    """The engine called `name`.

    Raises:
        UserError: there is no such engine, or it does not work here.
    """
    if name not in NAMES:
        raise UserError(f"engine={name!r} is unknown: use {' or '.join(map(repr, NAMES))}")
    with _LOCK:  # operators can be registered once
        engine: Engine = importlib.import_module(f"fcmae.engines.{name}").engine()
    return engine
