"""Engine `triton`: kernels that read packed patches and their neighbours directly, compiled by Triton for the GPU.

A *run* is `width` neighbouring positions in one row of a patch. Programs of the depthwise kernels handle `block` runs
and `block_c` channels; each column that a run's positions reach is loaded once per row of taps, for all of them.

The first step compiles the kernels, and tunes the convolution by timing it, which waits for the device: run it eagerly
before a CUDA graph is captured. What is fastest on a nearly empty GPU need not be on a full one, so every magnitude of
the batch is tuned anew. Only the convolution is tuned, since its sums have one order whatever the choice. The order of
all other sums follows from the shapes, so that the same inputs give the same bits, in the next process too.

Shapes: B images, V visible patches, p positions per side of a patch, C channels, k taps per side of the kernel,
(h, w) grid of patches, N positions of an image, S partial sums of an image.
"""
# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from fcmae.engines.engine import Engine
from fcmae.engines.operators import build_engine, sums
from fcmae.errors import UserError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise UserError(
        f"engine='triton' needs the package triton, which cannot be imported ({error}): "
        "install it with `pip install triton`, or use engine=torch"
    ) from error


# The kernels. Pointers are to contiguous memory, sums in the type of the taps, scales or partial sums at hand. There
# may be 2^31 elements and more, not positions. Sizes that change with the batch are no constants: none is compiled for.


@triton.jit
def _place(index, run, inside, patches, w, p: tl.constexpr, width: tl.constexpr):
    """Where runs lie: the image, the line in that image, and the column, counted in runs."""
    patch = run // (p * p // width)
    cell = tl.load(index + patch, mask=inside, other=0).to(tl.int32)
    line = cell // w * p + run // (p // width) % p
    column = cell % w * (p // width) + run % (p // width)
    return patch // patches, line, column


@triton.jit
def _find(slots, inside, image, line, column, patches, h, w, p: tl.constexpr, width: tl.constexpr):
    """The inverse of `_place`: the first position of each run in memory, and whether it is in the image and visible."""
    inside &= (line >= 0) & (line < h * p) & (column >= 0) & (column < p // width * w)
    slot = tl.load(slots + (image * h + line // p) * w + column // (p // width), mask=inside, other=-1)
    run = ((image * patches + slot) * p + line % p) * (p // width) + column % (p // width)
    return run.to(tl.int64) * width, inside & (slot >= 0)


@triton.jit
def _load(pointer, position, channel, inside, channels: tl.constexpr, kind: tl.constexpr):
    """(positions, channels) in the type of the sums, zeros where a position or channel is not inside."""
    mask = inside[:, None] & (channel < channels)[None, :]
    return tl.load(pointer + (position * channels)[:, None] + channel[None, :], mask=mask, other=0).to(kind)


@triton.jit
def _store(pointer, position, channel, inside, value, channels: tl.constexpr):
    mask = inside[:, None] & (channel < channels)[None, :]
    tl.store(pointer + (position * channels)[:, None] + channel[None, :], value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["runs", "magnitude", "patches", "h", "w"])
def _convolve(
    x,
    taps,
    bias,
    index,
    slots,
    y,
    runs,
    magnitude,  # of runs: for the tuning alone
    patches,
    h,
    w,
    channels: tl.constexpr,
    p: tl.constexpr,
    width: tl.constexpr,
    k: tl.constexpr,
    block: tl.constexpr,
    block_c: tl.constexpr,
):
    r: tl.constexpr = k // 2
    kind: tl.constexpr = taps.dtype.element_ty
    run = tl.program_id(0) * block + tl.arange(0, block)
    channel = tl.program_id(1) * block_c + tl.arange(0, block_c)
    inside, present = run < runs, channel < channels
    image, line, column = _place(index, run, inside, patches, w, p, width)
    start = tl.zeros((block, block_c), kind)
    if bias is not None:
        start += tl.load(bias + channel, mask=present, other=0)[None, :]
    total = ()  # one (block, block_c) per position of a run
    for _ in tl.static_range(width):
        total += (start,)
    for row in range(k):
        kernel = ()
        for tap in tl.static_range(k):
            kernel += (tl.load(taps + (row * k + tap) * channels + channel, mask=present, other=0)[None, :],)
        for at in tl.static_range(-r, width + r):  # columns, seen from the first position of the run
            if at == -r or at % width == 0:  # another run begins
                next_column = column + at // width
                first, seen = _find(slots, inside, image, line + row - r, next_column, patches, h, w, p, width)
            value = _load(x, first + at % width, channel, seen, channels, kind)
            more = ()
            for n in tl.static_range(width):
                more += (
                    tl.fma(value, kernel[at - n + r], total[n]) if at - n + r >= 0 and at - n + r < k else total[n],
                )
            total = more
    for n in tl.static_range(width):
        _store(y, run.to(tl.int64) * width + n, channel, inside, total[n], channels)


@triton.jit(do_not_specialize=["runs", "share", "patches", "h", "w"])
def _weight_gradient(
    x,
    grad,
    index,
    slots,
    partial,
    runs,
    share,
    patches,
    h,
    w,
    channels: tl.constexpr,
    p: tl.constexpr,
    width: tl.constexpr,
    k: tl.constexpr,
    block: tl.constexpr,
    block_c: tl.constexpr,
):
    """Sums over `share` blocks of runs, one row of taps after the other: all at once would not fit the registers."""
    r: tl.constexpr = k // 2
    kind: tl.constexpr = partial.dtype.element_ty
    channel = tl.program_id(1) * block_c + tl.arange(0, block_c)
    out = partial + tl.program_id(0).to(tl.int64) * ((k * k + 1) * channels) + channel
    of_bias = tl.zeros((block, block_c), kind)
    for row in range(k):
        total = ()  # one (block, block_c) per tap of the row
        for _ in tl.static_range(k):
            total += (tl.zeros((block, block_c), kind),)
        for number in range(share):
            run = (tl.program_id(0) * share + number) * block + tl.arange(0, block)
            inside = run < runs
            image, line, column = _place(index, run, inside, patches, w, p, width)
            given = ()  # the output's gradients at the positions of a run
            for n in tl.static_range(width):
                given += (_load(grad, run.to(tl.int64) * width + n, channel, inside, channels, kind),)
            if row == 0:
                for n in tl.static_range(width):
                    of_bias += given[n]
            for at in tl.static_range(-r, width + r):
                if at == -r or at % width == 0:
                    next_column = column + at // width
                    first, seen = _find(slots, inside, image, line + row - r, next_column, patches, h, w, p, width)
                value = _load(x, first + at % width, channel, seen, channels, kind)
                more = ()
                for tap in tl.static_range(k):
                    more += (
                        tl.fma(value, given[at - tap + r], total[tap])
                        if at - tap + r >= 0 and at - tap + r < width
                        else total[tap],
                    )
                total = more
        for tap in tl.static_range(k):
            tl.store(out + (row * k + tap) * channels, tl.sum(total[tap], axis=0), mask=channel < channels)
    tl.store(out + k * k * channels, tl.sum(of_bias, axis=0), mask=channel < channels)


@triton.jit
def _gelu(x):
    """GELU(x), and the share of the normal distribution below x, which it is x times of."""
    below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    return x * below, below


@triton.jit
def _vector(pointer, image, channel, channels: tl.constexpr):
    """(1, channels) of one image; image 0 where all have the same."""
    return tl.load(pointer + image * channels + channel, mask=channel < channels, other=0)[None, :]


@triton.jit(do_not_specialize=["length", "share", "splits"])
def _gelu_sums(
    x,
    grad,
    scale,
    bias,
    y,
    products,
    totals,
    length,
    share,
    splits,
    channels: tl.constexpr,
    block_n: tl.constexpr,
    block_c: tl.constexpr,
):
    """Sums over `share` blocks of positions, with h = GELU(x): of h * h; or, given grad, of h * grad and of grad.

    In the second case it writes y = h * scale + bias, too.
    """
    kind: tl.constexpr = products.dtype.element_ty
    channel = tl.program_id(1) * block_c + tl.arange(0, block_c)
    image, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    product = tl.zeros((block_n, block_c), kind)
    total = tl.zeros((block_n, block_c), kind)
    if grad is not None:
        s, b = _vector(scale, image, channel, channels), _vector(bias, 0, channel, channels)
    for number in range(share):
        position = (split * share + number) * block_n + tl.arange(0, block_n)
        inside = position < length
        place = position + image.to(tl.int64) * length
        h, _ = _gelu(_load(x, place, channel, inside, channels, kind))
        if grad is None:
            product += h * h
        else:
            g = _load(grad, place, channel, inside, channels, kind)
            product += h * g
            total += g
            _store(y, place, channel, inside, h * s + b, channels)
    out = tl.program_id(0) * channels + channel
    tl.store(products + out, tl.sum(product, axis=0), mask=channel < channels)
    if grad is not None:
        tl.store(totals + out, tl.sum(total, axis=0), mask=channel < channels)


@triton.jit(do_not_specialize=["length"])
def _gelu_map(x, grad, scale, shift, y, length, channels: tl.constexpr, block_n: tl.constexpr, block_c: tl.constexpr):
    """y = h * scale + shift (C,) with h = GELU(x); or, given grad, h' * (grad * scale + h * shift), shift (B, C)."""
    kind: tl.constexpr = scale.dtype.element_ty
    blocks = tl.cdiv(length, block_n)
    channel = tl.program_id(1) * block_c + tl.arange(0, block_c)
    image = tl.program_id(0) // blocks
    position = tl.program_id(0) % blocks * block_n + tl.arange(0, block_n)
    inside = position < length
    place = position + image.to(tl.int64) * length
    value = _load(x, place, channel, inside, channels, kind)
    h, below = _gelu(value)
    s = _vector(scale, image, channel, channels)
    if grad is None:
        result = h * s + _vector(shift, 0, channel, channels)
    else:
        slope = below + value * tl.exp(-0.5 * value * value) * 0.3989422804014327
        g = _load(grad, place, channel, inside, channels, kind)
        result = slope * (g * s + h * _vector(shift, image, channel, channels))
    _store(y, place, channel, inside, result, channels)


INTERPRETED = not isinstance(_gelu, triton.JITFunction)  # by TRITON_INTERPRET=1, on the CPU, slowly

# (block, block_c, warps). Four elements per thread, for many programs; or eight, for fewer loads per sum. Each one more
# costs every new shape seconds of compiling; sixteen per thread spill.
CONVOLUTIONS = ((16, 32, 4), (32, 32, 4))
# What follows decides about the order of sums. The interpreter's time goes by the number of programs.
WEIGHT_GRADIENT = {"block": 64, "block_c": 128} if INTERPRETED else {"block": 16, "block_c": 32}
GELU = {"block_n": 32, "block_c": 64}
POSITIONS = 512  # that a program of the weight gradient reads k times over: about as many as stay in the L1 cache
PROGRAMS = 1024  # the weight gradient's, at least, where the shape allows; a GPU runs some five per multiprocessor
GELU_PROGRAMS = 4096  # more, for short last rounds: these programs' partial sums are small
OPTIONS = {"enable_fp_fusion": True}  # Triton's default until 3.9, which warns that it will change


@functools.cache
def _tuned_convolve() -> Any:
    configs = [triton.Config({"block": n, "block_c": c}, num_warps=warps) for n, c, warps in CONVOLUTIONS]
    kept = "cache_results" in inspect.signature(triton.autotune).parameters  # from Triton 3.4 on: on disk
    return triton.autotune(configs, ["channels", "p", "k", "magnitude"], **({"cache_results": True} if kept else {}))(
        _convolve
    )


def _width(p: int) -> int:
    """Positions of a run: what fits the registers, and divides p."""
    return next(width for width in range(min(p, 8), 0, -1) if p % width == 0)


def _runs(tokens: Tensor) -> int:
    return tokens.numel() // (tokens.shape[-1] * _width(tokens.shape[2]))


def _sizes(tokens: Tensor, slots: Tensor, k: int) -> dict[str, int]:
    _, patches, p, _, channels = tokens.shape
    h, w = slots.shape[1:]
    return {"patches": patches, "h": h, "w": w, "channels": channels, "p": p, "width": _width(p), "k": k}


def _gelu_blocks(x: Tensor) -> tuple[int, int]:
    """How many blocks of positions an image has, and how many blocks of channels."""
    return triton.cdiv(x.shape[1], GELU["block_n"]), triton.cdiv(x.shape[2], GELU["block_c"])


class Kernels:
    """See `fcmae.engines.operators.Kernels`."""

    def convolve(self, tokens: Tensor, taps: Tensor, bias: Tensor | None, index: Tensor, slots: Tensor) -> Tensor:
        y, runs, sizes = torch.empty_like(tokens), _runs(tokens), _sizes(tokens, slots, round(taps.shape[0] ** 0.5))

        def grid(sizes: dict[str, int]) -> tuple[int, int]:
            return triton.cdiv(runs, sizes["block"]), triton.cdiv(tokens.shape[-1], sizes["block_c"])

        kernel, blocks = (_convolve, WEIGHT_GRADIENT) if INTERPRETED else (_tuned_convolve(), {})
        with torch.cuda.device_of(tokens):
            kernel[grid](tokens, taps, bias, index, slots, y, runs, runs.bit_length(), **sizes, **blocks, **OPTIONS)
        return y

    def weight_gradient(
        self, tokens: Tensor, grad: Tensor, index: Tensor, slots: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        runs, sizes, (block, block_c) = _runs(tokens), _sizes(tokens, slots, k), WEIGHT_GRADIENT.values()
        blocks, columns = triton.cdiv(runs, block), triton.cdiv(sizes["channels"], block_c)
        share = max(1, min(POSITIONS // (block * sizes["width"]), blocks * columns // PROGRAMS))
        splits = triton.cdiv(blocks, share)
        partial = tokens.new_empty(splits, k * k + 1, sizes["channels"], dtype=sums(tokens.dtype))  # last, the bias
        with torch.cuda.device_of(tokens):
            arguments = tokens, grad, index, slots, partial, runs, share
            _weight_gradient[splits, columns](*arguments, **sizes, **WEIGHT_GRADIENT, **OPTIONS)
        return partial[:, :-1].sum(0), partial[:, -1].sum(0)

    def gelu_squares(self, x: Tensor) -> Tensor:
        return self._gelu_sums(x, None, None, None, None)[0]

    def gelu_scale(self, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        y = torch.empty_like(x)
        self._gelu_map(x, None, scale, bias, y)
        return y

    def gelu_products(self, grad: Tensor, x: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.empty_like(x)
        return y, *self._gelu_sums(x, grad, scale, bias, y)

    def gelu_scale_backward_(self, grad: Tensor, x: Tensor, scale: Tensor, per_h: Tensor) -> None:
        self._gelu_map(x, grad, scale, per_h, grad)

    def _gelu_sums(self, x: Tensor, grad: Tensor | None, *more: Tensor | None) -> Tensor:
        """(1, B, C), or (2, B, C) given grad."""
        (batch, length, channels), (blocks, columns) = x.shape, _gelu_blocks(x)
        share = min(blocks, max(1, batch * blocks * columns // GELU_PROGRAMS))
        splits = triton.cdiv(blocks, share)
        partial = x.new_empty(1 if grad is None else 2, batch, splits, channels, dtype=sums(x.dtype))
        with torch.cuda.device_of(x):
            arguments = x, grad, *more, partial[0], None if grad is None else partial[1], length, share, splits
            _gelu_sums[batch * splits, columns](*arguments, channels, **GELU, **OPTIONS)
        return partial.sum(2)

    def _gelu_map(self, x: Tensor, *arguments: Tensor | None) -> None:
        (batch, length, channels), (blocks, columns) = x.shape, _gelu_blocks(x)
        with torch.cuda.device_of(x):
            _gelu_map[batch * blocks, columns](x, *arguments, length, channels, **GELU, **OPTIONS)


@functools.cache
def engine() -> Engine:
    """This engine.

    Raises:
        UserError: there is no CUDA device; only Triton's interpreter (TRITON_INTERPRET=1) does without.
    """
    if not INTERPRETED and not torch.cuda.is_available():
        raise UserError("engine='triton' needs a CUDA device and torch finds none: use engine=cpu or engine=torch")
    return build_engine("triton", Kernels(), device=None if INTERPRETED else "cuda")
