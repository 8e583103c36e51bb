"""Pictures of what a model makes of the patches that it does not see.

Shapes: B images, C channels, (H, W) pixels, (h, w) grid of mask patches.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from fcmae.errors import UserError
from fcmae.files import atomic_writer
from fcmae.masking import Mask
from fcmae.models.fcmae import FCMAE
from fcmae.models.targets import DrawableTarget

HEADINGS = ("input", "masked", "reconstruction", "error")
TILE = 200  # pixels: about the side of an enlarged image
GAP = 6  # pixels between the tiles
GREY, BLACK, WHITE = (170, 170, 170), (32, 32, 32), (255, 255, 255)
HEAT = ((0, 0, 0), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # dark to light, in equal steps


class Reconstruction(NamedTuple):
    """Images and what a model makes of them: (B, C, H, W), in the images' normalised space, in float32 at least."""

    input: Tensor
    masked: Tensor
    """What the model sees: the input, and 0 where it is hidden."""
    pasted: Tensor
    """The prediction as pixels, with the visible patches of the input pasted in."""
    error: Tensor
    """Absolute difference of `pasted` and `input`: 0 on visible patches."""
    hidden: Tensor
    """(B, 1, H, W) bool: the hidden pixels."""


@torch.no_grad()
def reconstruct(model: FCMAE, images: Tensor, mask: Mask) -> Reconstruction:
    """What the model makes of the hidden patches, in evaluation mode; its parts train afterwards as they did before.

    A target that normalises each patch gets the patch's own mean and deviation back, which the model did not predict:
    the picture shows structure, not whether the model knows a patch's brightness.

    Args:
        model: on the images' device.
        images: (B, C, H, W), normalised as in training.
        mask: on the same device, of B grids (H / patch_size, W / patch_size).

    Raises:
        UserError: images, mask and model do not fit each other, or its target cannot be drawn.
    """
    patch_size, target = model.masking.patch_size, model.target
    if not isinstance(target, DrawableTarget):
        raise UserError(f"the target, a {type(target).__name__}, has no to_pixels, without which nothing can be drawn")
    with _evaluating(model):
        pred = model(images, mask, whole=True).pred  # (B, h*w, ...)
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    hidden = ~mask.at(patch_size)  # (B, 1, H, W)
    pasted = torch.where(hidden, target.to_pixels(pred, images, patch_size).to(images.dtype), images)
    return Reconstruction(images, images.masked_fill(hidden, 0), pasted, (pasted - images).abs(), hidden)


def picture(
    reconstruction: Reconstruction, mean: Sequence[float], std: Sequence[float], *, error_maximum: float = 0.5
) -> Image.Image:
    """A reconstruction to look at: a row per image, with the columns input, masked, reconstruction, error.

    One channel is shown in grey; of three or more, the first three are shown as red, green, blue; of two, the first in
    grey. The error is the mean over all channels. Small images are enlarged to about 200 pixels, each pixel to a square
    of whole pixels; larger ones are shown pixel by pixel. What is not a number is shown as the largest value.

    Args:
        reconstruction: of B images with C channels, on any device.
        mean: C numbers, and
        std: C numbers, with which pixel values x in 0 to 255 became images: (x / 255 - mean) / std.
        error_maximum: the error at the light end of the scale, as a share of the range of pixel values; larger ones
            look the same. Keep it to compare pictures.

    Returns:
        An RGB picture.

    Raises:
        UserError: mean or std has not C numbers, or error_maximum is not above 0.
    """
    channels = reconstruction.input.shape[1]
    if len(mean) != channels or len(std) != channels:
        raise UserError(f"mean={list(mean)} and std={list(std)} must have one number for each of {channels} channels")
    if error_maximum <= 0:
        raise UserError(f"error_maximum={error_maximum} must be above 0, such as 0.5")
    center, scale = (torch.tensor(list(x), dtype=torch.float64)[:, None, None] for x in (mean, std))
    source, masked, pasted = (_colours(x.cpu() * scale + center) for x in reconstruction[:3])
    masked = torch.where(reconstruction.hidden[:, 0, :, :, None].cpu(), torch.tensor(GREY, dtype=torch.uint8), masked)
    error = _heat((reconstruction.error.cpu() * scale).mean(dim=1) / error_maximum)
    return _sheet((source, masked, pasted, error), f"{100 * error_maximum:.3g}%")


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Writes a picture so that whoever reads `path` finds all of it or the one before; makes missing folders.

    Raises:
        UserError: it cannot be written; `path` is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(path) as file:
        image.save(file, format="PNG")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode for a while; parts that were frozen in it stay so afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _colours(pixels: Tensor) -> Tensor:
    """(B, C, H, W) in 0 to 1 -> (B, H, W, 3) uint8."""
    shown = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1]
    return _levels(shown).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)


def _heat(values: Tensor) -> Tensor:
    """(..., H, W) in 0 to 1 -> (..., H, W, 3) uint8, from black over red to light yellow."""
    anchors = torch.tensor(HEAT, dtype=torch.float64).T[None]  # (1, 3, anchors)
    table = nn.functional.interpolate(anchors, size=256, mode="linear", align_corners=True)[0].T  # (256, 3)
    return table.round().to(torch.uint8)[_levels(values).long()]


def _levels(values: Tensor) -> Tensor:
    return (values * 255).round().clamp(0, 255).nan_to_num(255).to(torch.uint8)


def _sheet(columns: Sequence[Tensor], maximum: str) -> Image.Image:
    """Four columns of tiles, each (B, H, W, 3) uint8, under their headings, and the scale of the error below."""
    rows, height, width = columns[0].shape[:3]
    factor = max(1, round(TILE / max(height, width)))
    height, width = height * factor, width * factor
    size = max(16, width // 14)
    font, line = ImageFont.load_default(size=size), 2 * size
    column_width = max(width, *(int(font.getlength(heading)) for heading in HEADINGS))
    lefts = [GAP + column * (column_width + GAP) for column in range(len(HEADINGS))]
    sheet = Image.new("RGB", (lefts[-1] + column_width + GAP, line + rows * (height + GAP) + line), WHITE)
    draw = ImageDraw.Draw(sheet)
    for left, heading, tiles in zip(lefts, HEADINGS, columns, strict=True):
        draw.text((left + column_width // 2, line // 2), heading, BLACK, font, anchor="mm")
        for row, tile in enumerate(tiles):
            image = Image.fromarray(tile.numpy()).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (left + (column_width - width) // 2, line + row * (height + GAP)))
    sheet.paste(_scale(column_width, line, maximum), (lefts[-1], sheet.height - line))
    return sheet


def _scale(width: int, height: int, maximum: str) -> Image.Image:
    """The colours of the error from 0 to its maximum, on one line."""
    scale = Image.new("RGB", (width, height), WHITE)
    draw, font = ImageDraw.Draw(scale), ImageFont.load_default(size=height * 0.4)
    draw.text((0, height // 2), "0%", BLACK, font, anchor="lm")
    draw.text((width, height // 2), maximum, BLACK, font, anchor="rm")
    start, stop = int(font.getlength("0%  ")), width - int(font.getlength(f"  {maximum}"))
    thickness = height // 4
    bar = _heat(torch.linspace(0, 1, stop - start).expand(thickness, -1))  # (thickness, stop - start, 3)
    scale.paste(Image.fromarray(bar.numpy()), (start, (height - thickness) // 2))
    return scale
