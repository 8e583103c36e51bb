"""The usual parts put together: `create_model("tiny")`."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fcmae.engines import get_engine
from fcmae.errors import UserError
from fcmae.masking import Masking, RandomMask, patch_grid
from fcmae.models.block import GRNScope, Recompute
from fcmae.models.convnext import create_convnext
from fcmae.models.decoder import Decoder
from fcmae.models.encoder import Encoder
from fcmae.models.fcmae import FCMAE
from fcmae.models.targets import Pixels, Target

Part = TypeVar("Part")


def create_model(
    size: str = "custom",
    *,
    depths: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
    image_size: int | Sequence[int] = 224,
    in_chans: int = 3,
    patch_size: int | None = None,
    mask_ratio: float | None = None,
    masking: Masking | None = None,
    norm_pix_loss: bool | None = None,
    target: Target | None = None,
    decoder_depth: int = 1,
    decoder_dim: int = 512,
    use_grn: bool = True,
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
        image_size: side, or (height, width), in pixels, that the model is meant for: multiples of the patch. The
            network itself takes any such size; here it is checked that something is visible and something hidden.
        in_chans: channels of an image.
        patch_size: side of a mask patch in pixels, 32 or a multiple; None: as `RandomMask` has it.
        mask_ratio: share of hidden patches, in (0, 1); None: likewise.
        masking: a strategy instead of `RandomMask(mask_ratio=..., patch_size=...)`.
        norm_pix_loss: predict pixels normalised per patch, not raw ones; None: as `Pixels` has it.
        target: a target instead of `Pixels(norm_pix_loss=...)`.
        decoder_depth: ConvNeXt V2 blocks in the decoder, from 1.
        decoder_dim: their width.
        use_grn: whether the encoder's blocks have a GRN layer, as V2 has and V1 has not.
        grn_scope: `image`, or `batch` as in the original PyTorch code.
        drop_path_rate: stochastic depth, rising linearly to this rate in the last block.
        grad_checkpointing: what the encoder computes anew in the backward pass to save memory: none, mlp or block.
        engine: how the depthwise convolution on packed images is computed: auto, or one of `fcmae.engines.NAMES`.

    Raises:
        UserError: an unknown size, a value out of its bounds, or both a part and options of the usual one.
    """
    net = create_convnext(
        size, depths=depths, dims=dims, in_chans=in_chans, drop_path_rate=drop_path_rate, use_grn=use_grn
    )
    if decoder_depth < 1 or decoder_dim < 1:
        raise UserError(f"decoder_depth={decoder_depth}, decoder_dim={decoder_dim}: use a depth from 1, a width from 1")
    masking = _part("masking", masking, RandomMask, {"mask_ratio": mask_ratio, "patch_size": patch_size})
    target = _part("target", target, Pixels, {"norm_pix_loss": norm_pix_loss})
    _check_image_size(image_size, masking)
    if target.stride < 1 or Encoder.stride % target.stride:
        raise UserError(
            f"the target's stride={target.stride} does not divide {Encoder.stride}: use 1, 2, 4, 8, 16 or 32"
        )
    chosen = get_engine(engine)
    return FCMAE(
        encoder=Encoder(net, engine=chosen, grn_scope=grn_scope, grad_checkpointing=grad_checkpointing),
        decoder=Decoder(
            in_channels=net.num_features,
            out_channels=(Encoder.stride // target.stride) ** 2 * target.channels(in_chans),
            engine=chosen,
            depth=decoder_depth,
            dim=decoder_dim,
        ),
        masking=masking,
        target=target,
    )


def _part(name: str, given: Part | None, usual: Callable[..., Part], options: dict[str, Any]) -> Part:
    """The part that is given, or the usual one with those of its options that are."""
    chosen = {key: value for key, value in options.items() if value is not None}
    if given is None:
        return usual(**chosen)
    if chosen:
        told = ", ".join(f"{key}={value}" for key, value in chosen.items())
        raise UserError(
            f"{told} would not be used beside {name}={type(given).__name__}, which is given too: set "
            f"{' and '.join(f'{name}.{key}' for key in chosen)}, or leave {name} out"
        )
    return given


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
