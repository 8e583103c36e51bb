"""What a predictor that learns nothing reaches: the losses to compare a validation loss with.

Shapes: B images, C channels, (h, w) grid of patches, L = h * w, V visible patches per image, D target values per patch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fcmae.masking import Mask
from fcmae.models.targets import Target


class TrivialLosses(NamedTuple):
    """Two scalars in the units of `Output.loss`, in float32 at least."""

    mean: Tensor
    """Predicts each hidden patch's own mean, all channels together: about 1 for normalised pixels, less where patches
    are constant. A model below it has learned more than nothing."""
    nearest: Tensor
    """Repeats the nearest visible patch. Above `mean` unless neighbouring patches look alike pixel by pixel."""


@torch.no_grad()
def trivial_losses(target: Target, images: Tensor, mask: Mask, patch_size: int) -> TrivialLosses:
    """Whether a loss is good: the losses of two predictors without parameters, on the same hidden patches.

    Averaged as the model's loss is: over the values of a patch, then over the hidden patches of the batch. The nearest
    patch is that with the smallest Euclidean distance on the grid; of several, the first in row-major order.

    Args:
        target: what is predicted; any target, in its own space.
        images: (B, C, H, W), normalised as the model gets them.
        mask: B grids of (H / patch_size, W / patch_size).
        patch_size: side of a mask patch in pixels.

    Raises:
        UserError: the images are no multiple of the patch, the mask is not theirs, or it shows nothing or everything.
    """
    mask.check(images, patch_size)
    with torch.autocast(images.device.type, enabled=False):
        values = target(images, Mask.everything(len(images), *mask.grid, device=images.device))  # (B, L, D)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        own_mean = values.mean(dim=-1, keepdim=True)  # (B, L, 1)
        neighbour = _nearest_visible(mask)[:, :, None].expand_as(values)  # (B, L, D)
        return TrivialLosses(_loss(own_mean, values, mask), _loss(values.gather(1, neighbour), values, mask))


def _nearest_visible(mask: Mask) -> Tensor:
    """For each cell of the grid the number of the nearest visible one: (B, L) int64."""
    (h, w), (rows, columns) = mask.grid, mask.rows_and_columns
    cell = torch.arange(h * w, device=rows.device)[:, None]  # (L, 1)
    squared = (cell // w - rows[:, None]).square() + (cell % w - columns[:, None]).square()  # (B, L, V)
    return mask.index.gather(1, squared.argmin(dim=-1))  # argmin takes the first of equals, and index ascends


def _loss(pred: Tensor, values: Tensor, mask: Mask) -> Tensor:
    error = (pred - values).square().mean(dim=-1)  # (B, L)
    hidden = ~mask.visible.flatten(1)  # (B, L)
    return (error * hidden).sum() / hidden.sum()
