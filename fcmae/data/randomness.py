"""Random numbers that follow from what they are for: neither a worker's state nor a restart changes them."""

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np


def mix_seed(purpose: str, *numbers: int) -> int:
    """One well mixed 64-bit seed from what it is for and several small numbers, the same on every machine."""
    meant = repr((purpose, *map(int, numbers)))
    return int.from_bytes(hashlib.blake2b(meant.encode(), digest_size=8).digest(), "little")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's and NumPy's own generators, which timm's augmentations draw from, seeded here and restored after."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
