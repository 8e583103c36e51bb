"""The usual parts put together: `create_model("tiny")`."""

import difflib
from collections.abc import Sequence
from typing import Any

import timm
from timm.models.convnext import ConvNeXt

from fcmae.engines import get_engine
from fcmae.errors import UserError
from fcmae.masking import Masking, RandomMask, patch_grid
from fcmae.models.block import GRNScope, Recompute, initialize
from fcmae.models.decoder import Decoder
from fcmae.models.encoder import Encoder
from fcmae.models.fcmae import FCMAE
from fcmae.models.targets import Pixels, Target

SIZES = ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large", "huge")


def create_model(
    size: str = "custom",
    *,
    depths: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
    image_size: int | Sequence[int] = 224,
    in_chans: int = 3,
    patch_size: int = 32,
    mask_ratio: float = 0.6,
    masking: Masking | None = None,
    norm_pix_loss: bool = True,
    target: Target | None = None,
    decoder_depth: int = 1,
    decoder_dim: int = 512,
    grn_scope: GRNScope = "image",
    drop_path_rate: float = 0.0,
    grad_checkpointing: Recompute = "none",
    engine: str = "auto",
) -> FCMAE:
    """A masked autoencoder around a ConvNeXt V2, freshly initialised (truncated normal of deviation 0.02).

    Args:
        size: atto, femto, pico, nano, tiny, small, base, large or huge (paper appendix A; `small` is timm's), or
            `custom` with `depths` and `dims`.
        depths: blocks per stage, instead of the size's own.
        dims: channels per stage, instead of the size's own.
        image_size: side, or (height, width), in pixels, that the model is meant for: multiples of `patch_size`. The
            network itself takes any such size; here it is checked that something is visible and something hidden.
        in_chans: channels of an image.
        patch_size: side of a mask patch in pixels, 32 or a multiple.
        mask_ratio: share of hidden patches, in (0, 1).
        masking: a strategy instead of `RandomMask(mask_ratio=..., patch_size=...)`; then these two are not used.
        norm_pix_loss: predict pixels normalised per patch, not raw ones.
        target: a target instead of `Pixels(norm_pix_loss=...)`.
        decoder_depth: ConvNeXt V2 blocks in the decoder.
        decoder_dim: their width.
        grn_scope: `image`, or `batch` as in the original PyTorch code.
        drop_path_rate: stochastic depth, rising linearly to this rate in the last block.
        grad_checkpointing: what the encoder computes anew in the backward pass to save memory: none, mlp or block.
        engine: how the depthwise convolution on packed images is computed: auto, or one of `fcmae.engines.NAMES`.

    Raises:
        UserError: an unknown size, or a value out of its bounds.
    """
    net = _convnext(size, depths, dims, in_chans, drop_path_rate)
    initialize(net)
    if decoder_depth < 0 or decoder_dim < 1:
        raise UserError(f"decoder_depth={decoder_depth}, decoder_dim={decoder_dim}: use a depth from 0, a width from 1")
    masking = masking or RandomMask(mask_ratio=mask_ratio, patch_size=patch_size)
    target = target or Pixels(norm_pix_loss=norm_pix_loss)
    _check_image_size(image_size, masking)
    chosen = get_engine(engine)
    return FCMAE(
        encoder=Encoder(net, engine=chosen, grn_scope=grn_scope, grad_checkpointing=grad_checkpointing),
        decoder=Decoder(
            in_channels=net.num_features,
            out_channels=Encoder.stride**2 * in_chans * target.values_per_pixel,
            engine=chosen,
            depth=decoder_depth,
            dim=decoder_dim,
        ),
        masking=masking,
        target=target,
    )


def _convnext(
    size: str, depths: Sequence[int] | None, dims: Sequence[int] | None, in_chans: int, drop_path_rate: float
) -> ConvNeXt:
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
    options: dict[str, Any] = {"in_chans": in_chans, "num_classes": 0, "drop_path_rate": drop_path_rate}
    options |= {name: list(values) for name, values in (("depths", depths), ("dims", dims)) if values is not None}
    if size == "custom":
        return ConvNeXt(use_grn=True, ls_init_value=None, **options)
    net: Any = timm.create_model(f"convnextv2_{size}", **options)
    return net


def _check_image_size(image_size: int | Sequence[int], masking: Masking) -> None:
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2:
        raise UserError(f"image_size={list(sides)} must be one side or two, [height, width]")
    height, width = sides
    h, w = patch_grid(height, width, masking.patch_size)
    if isinstance(masking, RandomMask) and masking.visible_count(h * w) == h * w:
        raise UserError(
            f"mask_ratio={masking.mask_ratio} hides none of the {h * w} patches of a {height}x{width} image, "
            f"so there is nothing to learn: use a ratio above 0"
        )
