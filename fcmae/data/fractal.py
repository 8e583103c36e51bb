"""Labelled images without a download: fractals, drawn from iterated function systems at the time they are read.

A class is a system of affine maps; an image shows the set of points that the maps together leave as it is (Kataoka et
al., ACCV 2020, "Pre-training without Natural Images"). How systems are drawn, varied, coloured and put on a background
follows Anderson and Farrell, WACV 2022, "Improving Fractal Pre-training".
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.random import PCG64, Generator
from PIL import Image

from fcmae.data.labelled import LabelledDataModule
from fcmae.data.picture import Decoded
from fcmae.data.randomness import mix_seed
from fcmae.errors import UserError

Array = np.ndarray[Any, np.dtype[Any]]

_COVERED = (0.15, 0.85)
"""Least and largest share of a class's picture that its fractal covers."""
_COVERED_BY_IMAGE = (0.05, 0.95)
"""The same of an image's, which differs from the class's, and shows less of thin lines where it is large."""
_POINTS_PER_PIXEL = 2
_CHAINS, _SETTLING = 4096, 10
"""Points that move at the same time, at most, and their first steps, which are not drawn."""


class Fractals:
    """Fractals of so many classes, so many images each; every image follows from its class and number alone.

    Args:
        classes: number of them.
        images_per_class: number of images that each has.
        size: (height, width) of the images in pixels.
        in_chans: 1, or 3 for colours.

    Raises:
        UserError: no class or no image, or another number of channels.
    """

    def __init__(self, *, classes: int, images_per_class: int, size: tuple[int, int], in_chans: int) -> None:
        for name, value in (("classes", classes), ("images_per_class", images_per_class)):
            if value < 1:
                raise UserError(f"data.{name}={value} must be at least 1")
        if in_chans not in (1, 3):
            raise UserError(f"data.in_chans={in_chans}: fractals are drawn in grey or in colours, use 1 or 3")
        self.class_names = [f"fractal-{number:05d}" for number in range(classes)]
        self.labels = torch.arange(classes).repeat_interleave(images_per_class)
        self.held_out: list[int] | None = None
        self._images_per_class = images_per_class
        self._size = size
        self._in_chans = in_chans
        self._systems: dict[int, Array] = {}  # of the classes seen so far

    def __len__(self) -> int:
        return len(self.labels)

    def sample_id(self, index: int) -> str:
        """`fractal/<class>/<number in the class>`."""
        return "fractal/{}/{}".format(*divmod(index, self._images_per_class))

    def open(self, index: int) -> Decoded:
        """The picture, drawn anew."""
        label, number = divmod(index, self._images_per_class)
        if label not in self._systems:
            self._systems[label] = class_system(label)
        generator = _generator("fractal image", label, number)
        colours = _palette(generator, self._in_chans)  # first, so that they are the same at every size
        counts = _draw_some(self._systems[label], self._size, generator)
        shades = np.where(counts > 0, 256 + _levels(counts), _background(self._size, generator))
        return Decoded(torch.from_numpy(np.take(colours, shades, axis=1)))


@dataclass(kw_only=True, eq=False)
class FractalDataModule(LabelledDataModule):
    """Pre-training without natural images: as many classes and images as one likes, none of them stored.

    Args:
        classes: number of classes; more of them leave those that there are as they were.
        images_per_class: number of images that each has; likewise.
    """

    classes: int
    images_per_class: int

    def load_source(self) -> Fractals:
        return Fractals(
            classes=self.classes, images_per_class=self.images_per_class, size=self.size, in_chans=self.in_chans
        )


def class_system(label: int) -> Array:
    """The first system drawn for a class whose picture is neither nearly empty nor nearly full: (N, 2, 3)."""
    attempt = 0
    while True:
        generator = _generator("fractal class", label, attempt)
        system = _sample_system(generator)
        if _is_between(_draw(system, (64, 64), generator), _COVERED):
            return system
        attempt += 1


def _generator(purpose: str, *numbers: int) -> Generator:
    return Generator(PCG64(mix_seed(purpose, *numbers)))


def _sample_system(generator: Generator) -> Array:
    """2 to 8 affine maps, (N, 2, 3) as matrix and shift: contractions, neither too strong nor too weak together.

    The singular values s1 >= s2 of the N matrices are drawn such that the sum of s1 + 2 s2 is between (5 + N) / 2 and
    (6 + N) / 2, for which the pictures are best (Anderson and Farrell, section 3).
    """
    maps = int(generator.integers(2, 9))
    scales = _sample_singular_values(maps, generator.uniform((5 + maps) / 2, (6 + maps) / 2), generator)
    left, right = (_rotations(generator.uniform(-np.pi, np.pi, maps)) for _ in range(2))
    mirrored = generator.choice([-1.0, 1.0], (maps, 2))
    matrices = (left * scales[:, None, :]) @ (right * mirrored[:, None, :])
    return np.concatenate([matrices, generator.uniform(-1, 1, (maps, 2, 1))], axis=2)


def _sample_singular_values(maps: int, total: float, generator: Generator) -> Array:
    """(maps, 2): each in [0, 1], the larger one first, the sum of s1 + 2 s2 is `total`."""
    values = np.empty((maps, 2))
    for number in range(maps):
        others = 3 * (maps - 1 - number)  # as much as those that are yet to be drawn can take
        if others:
            values[number, 0] = generator.uniform(max(0.0, (total - others) / 3), min(1.0, total))
            first = values[number, 0]
            values[number, 1] = generator.uniform(
                max(0.0, (total - others - first) / 2), min(first, (total - first) / 2)
            )
        else:
            values[number, 1] = generator.uniform(max(0.0, (total - 1) / 2), total / 3)
            values[number, 0] = total - 2 * values[number, 1]
        total -= values[number, 0] + 2 * values[number, 1]
    return values


def _rotations(angles: Array) -> Array:
    """(N,) radians -> (N, 2, 2)."""
    return np.stack([np.cos(angles), -np.sin(angles), np.sin(angles), np.cos(angles)], axis=-1).reshape(-1, 2, 2)


def _draw_some(system: Array, size: tuple[int, int], generator: Generator) -> Array:
    """A picture of a system much like this one, turned, mirrored, larger or smaller; as `_draw` gives it."""
    for _ in range(4):
        chosen = generator.integers(len(system))
        least_shrinking = 1 / np.linalg.norm(system[chosen, :, :2], 2)
        similar = system.copy()
        similar[chosen] *= min(generator.uniform(0.8, 1.1), least_shrinking)
        angle = np.pi / 2 * generator.integers(4) + generator.uniform(-0.3, 0.3)
        turn = _rotations(np.array([angle]))[0] * generator.choice([-1.0, 1.0], (1, 2))
        turned = turn @ np.concatenate([similar[:, :, :2] @ turn.T, similar[:, :, 2:]], axis=2)
        counts = _draw(turned, size, generator, generator.uniform(0.7, 1.2), generator.uniform(-0.1, 0.1, 2))
        if _is_between(counts, _COVERED_BY_IMAGE):
            return counts
    return _draw(system, size, generator)


def _draw(
    system: Array, size: tuple[int, int], generator: Generator, zoom: float = 0.95, shift: Array | float = 0.0
) -> Array:
    """(height, width): how many points of a system's set are in each pixel; at a zoom of 1 it fills the picture."""
    points = _points(system, _POINTS_PER_PIXEL * size[0] * size[1], generator)  # (2, points), x and y
    low, high = points.min(1), points.max(1)
    sides = np.array([size[1], size[0]])
    scale = zoom * sides / np.maximum(high - low, 1e-6)
    start = sides * (0.5 + shift) - scale * (low + high) / 2
    x, y = points * scale.astype(np.float32)[:, None] + start.astype(np.float32)[:, None]
    inside = (x >= 0) & (x < size[1]) & (y >= 0) & (y < size[0])
    pixels = y[inside].astype(np.int64) * size[1] + x[inside].astype(np.int64)
    return np.bincount(pixels, minlength=size[0] * size[1]).reshape(size)


def _points(system: Array, count: int, generator: Generator) -> Array:
    """(2, at least `count`) float32: a random map moves a point, again and again; the set draws it near.

    A map is chosen in proportion to the area that it leaves, so that the points are spread evenly.
    """
    chains = min(_CHAINS, max(64, count // 16))
    steps = -(-count // chains)
    shares = np.abs(np.linalg.det(system[:, :, :2])) + 0.01  # else what is mapped to a line is never seen
    table = np.searchsorted(shares.cumsum() / shares.sum(), (np.arange(256) + 0.5) / 256)
    chosen = generator.integers(0, 256, (_SETTLING + steps, chains), dtype=np.uint8)
    maps = system.reshape(-1, 6).astype(np.float32)[table]  # (256, 6): each as often as its share
    points = np.empty((2, steps, chains), dtype=np.float32)
    x, y = np.zeros((2, chains), dtype=np.float32)
    for step, (a, b, e, c, d, f) in enumerate(np.take(maps.T, chosen, axis=1).transpose(1, 0, 2), -_SETTLING):
        x, y = a * x + b * y + e, c * x + d * y + f
        if step >= 0:
            points[:, step] = x, y
    return points.reshape(2, -1)


def _is_between(counts: Array, bounds: tuple[float, float]) -> bool:
    """Whether the share of pixels that are hit is within bounds."""
    return bool(bounds[0] <= np.count_nonzero(counts) / counts.size <= bounds[1])


def _levels(counts: Array) -> Array:
    """Counts of points -> 0 to 255, in proportion to their logarithms."""
    most = int(counts.max())
    return np.round(255 * np.log1p(np.arange(most + 1)) / np.log1p(most)).astype(np.int64)[counts]


def _background(size: tuple[int, int], generator: Generator) -> Array:
    """(height, width), 0 to 255: noise of all scales, each a share of the next larger one's strength, as clouds are."""
    roughness = generator.uniform(0.3, 0.6)
    clouds = np.zeros((1, 1), dtype=np.float32)
    for octave in range(5, -1, -1):
        height, width = (-(-side // 2**octave) + 1 for side in size)
        clouds = np.asarray(Image.fromarray(clouds).resize((width, height), Image.Resampling.BICUBIC))
        if octave:
            clouds = clouds + roughness ** (5 - octave) * generator.standard_normal(clouds.shape, dtype=np.float32)
    clouds = clouds[: size[0], : size[1]]
    low, high = clouds.min(), clouds.max()
    return ((clouds - low) * (255 / max(high - low, 1e-6))).astype(np.int64)


def _palette(generator: Generator, in_chans: int) -> Array:
    """(in_chans, 512) uint8: 256 shades of the background, then 256 of the fractal, one of them dark, the other light.

    Their hues go from any one to any other. Grey is the brightness of the colours (ITU-R BT.601).
    """
    start, span = generator.uniform([10, 140], [50, 180]), generator.uniform(20, 50, 2)
    hue, turn = generator.uniform(-np.pi, np.pi, (2, 2))
    shades = np.linspace(0, 1, 256)[:, None]  # (256, 1), beside two palettes
    bright = start + span * shades
    angle, colourful = hue + turn * shades, generator.uniform(10, 60, 2)
    blue, red = colourful * np.cos(angle), colourful * np.sin(angle)
    channels = [bright + 1.402 * red, bright - 0.344 * blue - 0.714 * red, bright + 1.772 * blue]
    both = np.stack([bright] if in_chans == 1 else channels)  # (in_chans, 256, 2)
    order = [0, 1] if generator.random() < 0.5 else [1, 0]
    return np.clip(both[:, :, order], 0, 255).astype(np.uint8).transpose(0, 2, 1).reshape(in_chans, 512)
