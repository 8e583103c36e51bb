"""JPEGs of any size with as much detail as photographs have, without a download."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TILE = (500, 375)
"""(width, height) up to which a picture is one part of one photograph, in pixels."""
CLASSES = ("a", "b")

Photograph = np.ndarray[Any, np.dtype[np.uint8]]
"""(height, width, 3)."""


def photographs() -> dict[str, Photograph]:
    """What scikit-learn carries, and, where it is installed, scikit-image; by name, all larger than `TILE`.

    Nothing is fetched: these lie in the packages.
    """
    from sklearn.datasets import load_sample_images  # takes a second, which other benchmarks need not wait for

    samples = load_sample_images()
    found = {Path(name).stem: image for name, image in zip(samples.filenames, samples.images, strict=True)}
    try:
        from skimage import data
    except ImportError:
        return found
    return found | {"astronaut": data.astronaut(), "coffee": data.coffee(), "rocket": data.rocket()}


def write_jpegs(folder: Path, size: tuple[int, int], count: int, *, quality: int, seed: int) -> Iterator[Path]:
    """Writes different pictures into a folder per class, and gives each as soon as it is there.

    A picture larger than `TILE` is put together from parts of photographs in their own resolution: enlarged, it would
    have too little detail, and be read too fast.

    Args:
        folder: gets the folders of the classes.
        size: (width, height) in pixels.
        count: of the pictures.
        quality: of the JPEGs, 1 to 100.
        seed: of the parts.
    """
    numbers = np.random.default_rng(seed)
    sources = list(photographs().values())
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        file = folder / CLASSES[index % len(CLASSES)] / f"{index:04d}.jpg"
        _picture(sources, size, numbers).save(file, quality=quality)
        yield file


def _picture(sources: list[Photograph], size: tuple[int, int], numbers: np.random.Generator) -> Image.Image:
    picture = Image.new("RGB", size)
    for top in range(0, size[1], TILE[1]):
        for left in range(0, size[0], TILE[0]):
            photograph = sources[numbers.integers(len(sources))]
            y, x = (
                numbers.integers(whole - part + 1) for whole, part in zip(photograph.shape, TILE[::-1], strict=False)
            )
            part = photograph[y : y + TILE[1], x : x + TILE[0]]
            picture.paste(Image.fromarray(part[:, :: numbers.choice((-1, 1))]), (left, top))
    return picture
