"""Engine `minkowski`: MinkowskiEngine's sparse depthwise convolution, the library of the original implementation.

Slow, and there to compare with; docs/engines.md says how to install it. Our parameters are re-ordered on the way.

Shapes: B images, C channels, (h, w) grid of patches, V visible ones, p positions per side of a patch,
N = B * V * p * p positions in all, k taps per side of the kernel.
"""

import collections
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fcmae.engines.engine import Engine
from fcmae.engines.torch import engine as torch_engine
from fcmae.errors import UserError
from fcmae.masking import Mask


def _import() -> Any:
    added = not hasattr(collections, "Sequence")
    if added:
        collections.Sequence = Sequence  # type: ignore[attr-defined]  # it imports that name, gone with Python 3.10
    try:
        import MinkowskiEngine
    except ModuleNotFoundError as error:
        raise UserError(
            "engine='minkowski' needs MinkowskiEngine, which is not installed: the extra fcmae[minkowski] takes a C++ "
            "compiler, so run scripts/install_minkowski.sh first, see docs/engines.md"
        ) from error
    except ImportError as error:  # its compiled half does not fit
        raise UserError(
            f"engine='minkowski': the installed MinkowskiEngine does not load, most often as it was built for another "
            f"torch than {torch.__version__}: uninstall it and build it again, see docs/engines.md ({error})"
        ) from error
    finally:
        if added:
            del collections.Sequence  # type: ignore[attr-defined]
    return MinkowskiEngine


ME = _import()


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Mask) -> Tensor:
    """Depthwise convolution over the visible neighbours of each visible position (a submanifold convolution).

    Args:
        x: (B, C, V*p, p), a packed image; computed in float32, or float64 if it is that, whatever autocast says.
        weight: (C, 1, k, k), k odd.
        bias: (C,) or None.
        mask: what is visible. The coordinates come from it, so a position whose features are all zero takes part;
            the original, which asked the features, lost it.

    Returns:
        (B, C, V*p, p), of the type that torch's convolution would return.

    Raises:
        UserError: x is on a device that this build of MinkowskiEngine cannot use.
    """
    if not (x.is_cpu or (x.is_cuda and ME.is_cuda_available())):
        raise UserError(
            f"engine='minkowski': the installed MinkowskiEngine was built for the CPU, not for {x.device.type}: "
            "use trainer=cpu or engine=torch"
        )
    batch, channels, _, p = x.shape
    precision = torch.promote_types(x.dtype, torch.float32)
    tokens = x.permute(0, 2, 3, 1).reshape(-1, channels).to(precision)  # (N, C)
    # Row offsets run fastest there, column offsets here.
    kernel = weight[:, 0].permute(2, 1, 0).reshape(-1, channels).to(precision)  # (k*k, C)

    kind = ME.CoordinateMapType.CUDA if x.is_cuda else ME.CoordinateMapType.CPU
    # Without num_threads=0 it would set the number of threads of the whole process, torch's too.
    manager = ME.CoordinateManager(D=2, num_threads=0, coordinate_map_type=kind)
    sparse = ME.SparseTensor(tokens, coordinates=_coordinates(mask, p), coordinate_manager=manager)
    convolution = _convolution(channels, weight.shape[-1], x.is_cuda)
    y = torch.func.functional_call(convolution, {"kernel": kernel}, (sparse,)).F
    y = y[sparse.inverse_mapping]  # (N, C): from its order of the coordinates back to ours
    if bias is not None:
        y = y + bias.to(precision)
    return y.to(_output_type(x)).view(batch, -1, p, channels).permute(0, 3, 1, 2)  # (B, C, V*p, p)


def _coordinates(mask: Mask, p: int) -> Tensor:
    """(N, 3) int32, contiguous: sample, row and column of each position, in the order of the packed image."""
    width = mask.grid[1]
    inside = torch.arange(p, device=mask.index.device)
    cell = mask.index[:, :, None, None]  # (B, V, 1, 1)
    sample = torch.arange(len(mask.index), device=mask.index.device)[:, None, None, None]
    rows = cell // width * p + inside[:, None]  # (B, V, p, 1)
    columns = cell % width * p + inside  # (B, V, 1, p)
    return torch.stack(torch.broadcast_tensors(sample, rows, columns), dim=-1).flatten(0, 3).int()


def _convolution(channels: int, k: int, cuda: bool) -> torch.nn.Module:
    """Their layer, for its arithmetic alone: its kernel is replaced by ours."""
    # The authors' fork has one for CUDA only; the released package has one written over its kernel maps.
    fork = getattr(ME, "MinkowskiDepthwiseConvolution", None)
    layer = fork if fork is not None and cuda else ME.MinkowskiChannelwiseConvolution
    with torch.random.fork_rng(devices=()):  # it fills its kernel with random numbers, which the masks would miss
        return layer(channels, kernel_size=k, dimension=2)


def _output_type(x: Tensor) -> torch.dtype:
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # autocast leaves float64 alone
        return torch.get_autocast_dtype(device)
    return x.dtype


def engine() -> Engine:
    """This engine: all but the convolution is torch's."""
    return replace(torch_engine(), name="minkowski", depthwise=depthwise)
