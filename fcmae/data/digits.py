"""The embedded demonstration data: scikit-learn's 1,797 scanned handwritten digits of 8x8 pixels."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from fcmae.data.labelled import LabelledDataModule
from fcmae.data.picture import Decoded
from fcmae.errors import UserError


class Digits:
    """Real scanned digits, enlarged (bicubic), light strokes on black.

    Args:
        size: (height, width) to enlarge to, in pixels.
        in_chans: 1, or 3 for the same in three channels.
    """

    def __init__(self, *, size: tuple[int, int], in_chans: int) -> None:
        from sklearn.datasets import load_digits

        if in_chans not in (1, 3):
            raise UserError(f"data.in_chans={in_chans}: the digits are grey, use 1, or 3 for copies of it")
        digits = load_digits()  # images (1797, 8, 8), 0 to 16
        self.class_names = [str(name) for name in digits.target_names]
        self.labels = torch.from_numpy(digits.target).long()
        self.held_out: list[int] | None = None
        self._images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        self._size = size
        self._mode = "L" if in_chans == 1 else "RGB"

    def __len__(self) -> int:
        return len(self._images)

    def sample_id(self, index: int) -> str:
        """`digits/<number in scikit-learn's order>`."""
        return f"digits/{index}"

    def open(self, index: int) -> Decoded:
        """The enlarged digit."""
        image = Image.fromarray(self._images[index]).resize(self._size[::-1], Image.Resampling.BICUBIC)
        return Decoded(image.convert(self._mode))


@dataclass(kw_only=True, eq=False)
class DigitsDataModule(LabelledDataModule):
    """Demonstration data: needs no download, looks like something, learns in minutes."""

    def load_source(self) -> Digits:
        return Digits(size=self.size, in_chans=self.in_chans)
