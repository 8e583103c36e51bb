"""timm's ConvNeXt V2 by size: the network that is pre-trained, fine-tuned and exported. Knows no mask and no engine."""

import difflib
from collections.abc import Sequence
from typing import Any

import timm
from timm.models.convnext import ConvNeXt
from torch import nn

from fcmae.errors import UserError

SIZES = ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large", "huge")


def create_convnext(
    size: str,
    *,
    depths: Sequence[int] | None,
    dims: Sequence[int] | None,
    in_chans: int,
    num_classes: int = 0,
    drop_path_rate: float = 0.0,
    use_grn: bool = True,
) -> ConvNeXt:
    """A ConvNeXt V2, freshly initialised (truncated normal of deviation 0.02).

    Args:
        size: one of SIZES (paper appendix A; `small` is timm's), or `custom` with `depths` and `dims`.
        depths: blocks per stage, instead of the size's own.
        dims: channels per stage, instead of the size's own.
        in_chans: channels of an image.
        num_classes: of the classifier; 0 for none.
        drop_path_rate: stochastic depth, rising linearly to this rate in the last block.
        use_grn: whether blocks have a GRN layer, as V2 has and V1 has not.

    Raises:
        UserError: an unknown size, or a value out of its bounds.
    """
    if size not in (*SIZES, "custom"):
        close = difflib.get_close_matches(size, SIZES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"size={size!r} is not one of {', '.join(SIZES)} or custom{hint}")
    if size == "custom" and (depths is None or dims is None):
        raise UserError("size='custom' needs depths and dims, such as [2, 2, 6, 2] and [40, 80, 160, 320]")
    for name, values in (("depths", depths), ("dims", dims)):
        if values is not None and (len(values) != 4 or min(values) < 1):
            raise UserError(f"{name}={list(values)} must be four numbers from 1, one per stage")
    if in_chans < 1 or not 0 <= drop_path_rate < 1:
        raise UserError(f"in_chans={in_chans}, drop_path_rate={drop_path_rate}: use channels from 1, a rate in [0, 1)")
    options: dict[str, Any] = {"in_chans": in_chans, "num_classes": num_classes, "drop_path_rate": drop_path_rate}
    options |= {"use_grn": use_grn, "ls_init_value": None}
    options |= {name: list(values) for name, values in (("depths", depths), ("dims", dims)) if values is not None}
    net: Any = ConvNeXt(**options) if size == "custom" else timm.create_model(f"convnextv2_{size}", **options)
    initialize(net)
    return net


def initialize(module: nn.Module) -> None:
    """Truncated normal of deviation 0.02 for kernels and matrices, zero for their biases (paper table 8).

    Cut at five deviations: with the usual bounds of +-2 some samplers return, about once in ten million draws, the
    bound itself, a hundred deviations out.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.1, b=0.1)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
