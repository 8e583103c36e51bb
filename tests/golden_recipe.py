"""Parameters and images of the golden cases, made from their names alone, so that only results need to be stored.

splitmix64 of (crc32 of the name, position) gives uniform numbers, the same with every version of numpy.
"""

import zlib

import numpy as np


def _random_bits(count: int, seed: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = z + np.uint64(seed) * np.uint64(0xD1342543DE82EF95)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def unit(shape: tuple[int, ...], name: str) -> np.ndarray:
    """float64, mean 0, deviation 1, uniform."""
    bits = _random_bits(int(np.prod(shape)), zlib.crc32(name.encode()))
    uniform = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return ((uniform * 2 - 1) * np.sqrt(3.0)).reshape(shape)


def parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32; name and shape as in the original implementation's pre-training state dict."""
    leaf = name.split(".")[-1]
    is_norm = ".norm." in name or ".ln." in name or name.startswith("encoder.downsample_layers.0.1.")
    mean = 1.0 if is_norm and leaf == "weight" else 0.0
    if is_norm and leaf == "weight":
        std = 0.1
    elif leaf in ("gamma", "mask_token"):
        std = 0.5
    elif leaf in ("beta", "bias"):
        std = 0.1
    elif leaf == "kernel":  # (K, C) or (K, C_in, C_out)
        std = (shape[0] * (shape[1] if len(shape) == 3 else 1)) ** -0.5
    else:
        std = int(np.prod(shape[1:])) ** -0.5
    return (mean + std * unit(shape, "param:" + name)).astype(np.float32)


def images(case: str, count: int, size: int) -> np.ndarray:
    """(count, 3, size, size) float32: images that differ so much that a norm over the batch is not one per image."""
    noise = unit((count, 3, size, size), "img:" + case)
    offset = unit((count, 3, 1, 1), "off:" + case)
    t = np.arange(size) / 32.0
    made = np.empty_like(noise)
    for i in range(count):
        pattern = np.sin((1 + i) * t)[None, :, None] * np.cos((0.7 + 0.5 * i) * t)[None, None, :]
        made[i] = noise[i] * (0.15 + 0.5 * i) + offset[i] + pattern
    return made.astype(np.float32)
