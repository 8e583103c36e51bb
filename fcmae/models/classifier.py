"""timm's ConvNeXt V2 with a classifier on top: what is fine-tuned. It sees whole images, so no engine is needed."""

from collections.abc import Sequence

import torch
from timm.models.convnext import ConvNeXt

from fcmae.errors import UserError
from fcmae.models.convnext import create_convnext


def create_classifier(
    size: str = "custom",
    *,
    depths: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
    in_chans: int = 3,
    num_classes: int,
    drop_path_rate: float = 0.0,
    head_init_scale: float = 1.0,
    use_grn: bool = True,
    grad_checkpointing: bool = False,
) -> ConvNeXt:
    """A classifier, freshly initialised; `checkpoints.load_into` gives it pre-trained weights.

    Args:
        size: atto, femto, pico, nano, tiny, small, base, large or huge (paper appendix A; `small` is timm's), or
            `custom` with `depths` and `dims`.
        depths: blocks per stage, instead of the size's own.
        dims: channels per stage, instead of the size's own.
        in_chans: channels of an image.
        num_classes: number of classes.
        drop_path_rate: stochastic depth, rising linearly to this rate in the last block.
        head_init_scale: factor on the classifier's initial weights.
        use_grn: whether blocks have a GRN layer, as V2 has and V1 has not.
        grad_checkpointing: compute each block anew in the backward pass, to save memory.

    Raises:
        UserError: an unknown size, or a value out of its bounds.
    """
    if num_classes < 1 or head_init_scale < 0:
        raise UserError(
            f"num_classes={num_classes}, head_init_scale={head_init_scale}: use classes from 1, a scale from 0"
        )
    net = create_convnext(
        size,
        depths=depths,
        dims=dims,
        in_chans=in_chans,
        num_classes=num_classes,
        drop_path_rate=drop_path_rate,
        use_grn=use_grn,
    )
    with torch.no_grad():
        net.head.fc.weight.mul_(head_init_scale)
        net.head.fc.bias.mul_(head_init_scale)
    net.set_grad_checkpointing(grad_checkpointing)
    return net
