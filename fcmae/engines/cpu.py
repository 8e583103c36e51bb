"""Engine `cpu`: kernels that read packed patches and their neighbours directly, compiled from `cpu.c` at first use.

Compiling takes a second or two per element type, with the C compiler that the machine has, for the processor that it
has; the result is kept in the user's cache. Nothing is compiled when the package is installed, and without a compiler
the engine says so.

Shapes: B images, V visible patches, p positions per side of a patch, C channels, k taps per side of the kernel,
(h, w) grid of patches, N positions of an image.
"""

import ctypes
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcmae.engines.engine import Engine
from fcmae.engines.native import load_library
from fcmae.engines.operators import build_engine, sums
from fcmae.errors import UserError

SOURCE = Path(__file__).with_name("cpu.c")
ELEMENTS = {torch.float32: "FLOAT", torch.bfloat16: "BFLOAT16", torch.float64: "DOUBLE"}


@functools.cache
def engine() -> Engine:
    """This engine.

    Raises:
        UserError: its kernels cannot be compiled or loaded here.
    """
    try:
        _library(torch.float32)
    except UserError as error:
        raise UserError(f"engine='cpu' does not work here: {error}; or use engine=torch") from error
    return build_engine("cpu", Kernels(), device="cpu")


class Kernels:
    """See `fcmae.engines.operators.Kernels`."""

    def convolve(self, tokens: Tensor, taps: Tensor, bias: Tensor | None, index: Tensor, slots: Tensor) -> Tensor:
        bias = taps.new_zeros(taps.shape[1]) if bias is None else bias
        output = torch.empty_like(_known(tokens))
        _depthwise(_known(tokens), output, index, slots, math.isqrt(taps.shape[0]), taps=taps, bias=bias)
        return output.to(tokens.dtype)

    def weight_gradient(
        self, tokens: Tensor, grad: Tensor, index: Tensor, slots: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        tokens, grad = _known(tokens), _known(grad)
        of_taps = tokens.new_empty(tokens.shape[0], k * k, tokens.shape[-1], dtype=sums(tokens.dtype))
        _depthwise(tokens, grad, index, slots, k, of_taps=of_taps)
        return of_taps.sum(0), grad.sum((0, 1, 2, 3), dtype=of_taps.dtype)

    def gelu_squares(self, x: Tensor) -> Tensor:
        x = _known(x)
        squares = _partial_sums(x)
        _run(_library(x.dtype).gelu_squares, _segments(x), *x.shape[1:], x, squares)
        return squares.sum(1)

    def gelu_scale(self, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        y = torch.empty_like(_known(x))
        _run(_library(y.dtype).gelu_scale, _segments(y), *x.shape[1:], _known(x), scale, bias, y)
        return y.to(x.dtype)

    def gelu_products(self, grad: Tensor, x: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, products, totals = torch.empty_like(_known(x)), _partial_sums(_known(x)), _partial_sums(_known(x))
        arguments = _known(grad), _known(x), scale, bias, y, products, totals
        _run(_library(y.dtype).gelu_products, _segments(y), *x.shape[1:], *arguments)
        return y.to(x.dtype), products.sum(1), totals.sum(1)

    def gelu_scale_backward_(self, grad: Tensor, x: Tensor, scale: Tensor, per_h: Tensor) -> None:
        known = _known(grad)
        _run(_library(known.dtype).gelu_scale_backward, _segments(known), *x.shape[1:], known, _known(x), scale, per_h)
        if known is not grad:
            grad.copy_(known)


def _known(x: Tensor) -> Tensor:
    """As it is, or in float32 where the kernels do not know its type (float16)."""
    return x if x.dtype in ELEMENTS else x.float()


def _depthwise(
    tokens: Tensor,
    other: Tensor,
    index: Tensor,
    slots: Tensor,
    k: int,
    *,
    taps: Tensor | None = None,
    bias: Tensor | None = None,
    of_taps: Tensor | None = None,
) -> None:
    """Writes the output to `other`; or, given `of_taps` (B, k*k, C), reads `other`, its gradient, and writes that."""
    library = _library(tokens.dtype)
    batch, patches, p, _, channels = tokens.shape
    block = library.block_of(ctypes.c_int64(p))
    if index.numel() and not (index.min() >= 0 and index.max() < slots[0].numel()):  # the kernels write there
        raise UserError(f"the mask's index goes from {index.min()} to {index.max()}, its grid has {slots[0].numel()}")
    blocks = -(-channels // block)
    shape = (ctypes.c_int64 * 6)(patches, p, channels, k, *slots.shape[1:])
    if taps is not None:  # padded to whole blocks, a block's taps together
        taps = torch.nn.functional.pad(taps, (0, blocks * block - channels))
        taps = taps.view(k * k, blocks, block).transpose(0, 1).contiguous()
    if bias is not None:
        bias = torch.nn.functional.pad(bias, (0, blocks * block - channels))
    _run(library.depthwise, batch * blocks, shape, index, tokens, other, taps, bias, of_taps)


def _segments(x: Tensor) -> int:
    return x.shape[0] * _segments_of_an_image(x)


def _segments_of_an_image(x: Tensor) -> int:
    segment: int = _library(x.dtype).segment()
    return -(-x.shape[1] // segment)


def _partial_sums(x: Tensor) -> Tensor:
    """(B, segments, C), to be written."""
    return x.new_empty(x.shape[0], _segments_of_an_image(x), x.shape[2], dtype=sums(x.dtype))


def _run(function: Callable[..., int], tasks: int, *arguments: Any) -> None:
    """Calls function(first, last, ...) so that all tasks are done, on as many threads as torch uses.

    The other arguments are tensors, whole numbers, None, or what ctypes knows.
    """
    # Tensors stay referenced by `arguments` until all is done; ctypes lets go of Python's lock during a call.
    values = [_c_value(argument) for argument in arguments]
    threads = min(torch.get_num_threads(), tasks)
    if tasks == 0:
        return
    bounds = [ctypes.c_int64(tasks * number // threads) for number in range(threads + 1)]
    if threads == 1:
        codes = [function(*bounds, *values)]
    else:
        pool = _threads(torch.get_num_threads())
        futures = [pool.submit(function, *bounds[n : n + 2], *values) for n in range(threads)]
        wait(futures)  # whatever interrupts: they work on memory that is not theirs
        codes = [future.result() for future in futures]
    if any(codes):
        raise MemoryError("engine 'cpu': no memory for the map of one block of channels")


def _c_value(argument: Any) -> Any:
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_void_p(argument.data_ptr()) if isinstance(argument, Tensor) else argument


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="fcmae-cpu")


def _library(dtype: torch.dtype) -> ctypes.CDLL:
    return load_library(SOURCE, f"ELEMENT_{ELEMENTS[dtype]}")
