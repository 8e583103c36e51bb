"""Python lines for model cards: a picture prepared as it was in training, without this package."""

from fcmae.data.preparation import Preparation


def opened(preparation: Preparation) -> str | None:
    """The expression of a PIL image with the right channels; None where PIL has no such images."""
    mode = {1: "L", 3: "RGB"}.get(preparation.in_chans)
    return mode and f'Image.open("image.jpg").convert("{mode}")'


def imports(preparation: Preparation, *modules: str) -> list[str]:
    """Lines that import numpy, `modules`, and PIL where it can hold the pictures."""
    names = ["numpy as np", *modules]
    return [f"import {name}" for name in names] + ["from PIL import Image"] * (opened(preparation) is not None)


def picture_lines(preparation: Preparation) -> list[str]:
    """Lines that make of a picture's file `images`, a float32 array (1, C, H, W), with PIL and numpy alone."""
    height, width = preparation.image_size
    image = opened(preparation)
    lines = [f"pixels = np.zeros(({height}, {width}, {preparation.in_chans}))  # your image's, in [0, 1]"]
    if image is not None:
        lines = [f"image = {image}", *_fitted(height, width, preparation.crop_share)]
        lines.append(f"pixels = np.asarray(image).reshape({height}, {width}, {preparation.in_chans}) / 255")
    return [
        *lines,
        f"pixels = (pixels - {list(preparation.mean)}) / {list(preparation.std)}",
        "images = pixels.transpose(2, 0, 1)[None].astype(np.float32)",
    ]


def _fitted(height: int, width: int, share: float | None) -> list[str]:
    """As `evaluation_transform` does it, to the pixel."""
    if share is None:
        return [f"image = image.resize(({width}, {height}), Image.Resampling.BICUBIC)"]
    tall, wide = int(height / share), int(width / share)
    if height == width:
        sides = f"[{tall} * side // min(image.size) for side in image.size]"
    else:
        sides = f"[round(side / min(image.width / {wide}, image.height / {tall})) for side in image.size]"
    return [
        f"image = image.resize({sides}, Image.Resampling.BICUBIC)",
        f"left, top = round((image.width - {width}) / 2), round((image.height - {height}) / 2)",
        f"image = image.crop((left, top, left + {width}, top + {height}))",
    ]
