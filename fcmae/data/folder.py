"""Any folder of images, recursively; no labels needed."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fcmae.data.datamodule import ImageDataModule
from fcmae.data.source import Source
from fcmae.errors import UserError

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MODES = {1: "L", 3: "RGB"}


class Folder:
    """The images below a folder, in the order of their paths.

    Args:
        path: the folder. Links to folders are followed, each folder once; hidden files are left out.
        in_chans: 1 for grey, 3 for RGB.
        names: the images to take, as paths below the folder; None for all.

    Raises:
        UserError: no such folder, one that cannot be read, or no image in it.
    """

    def __init__(self, *, path: str | Path, in_chans: int, names: Sequence[str] | None = None) -> None:
        if in_chans not in _MODES:
            raise UserError(f"data.in_chans={in_chans}: a folder of images is read with 1 (grey) or 3 (RGB) channels")
        self.path = Path(path).expanduser()
        self._mode = _MODES[in_chans]
        if not self.path.is_dir():
            what = "is a file" if self.path.exists() else "does not exist"
            raise UserError(f"{path} {what}: name a folder of images")
        self._names = self.find_names() if names is None else list(names)
        if not self._names:
            raise UserError(f"{path} holds no image: looked in all its folders for {', '.join(EXTENSIONS)}")

    def find_names(self) -> list[str]:
        """The paths of the images, below the folder."""
        return sorted(_image_names(self.path))

    def __len__(self) -> int:
        return len(self._names)

    def sample_id(self, index: int) -> str:
        """The path below the folder."""
        return self._names[index]

    def load(self, index: int) -> Image.Image:
        """The image, turned as its EXIF orientation says, in grey or RGB; 16-bit grey is scaled to 8 bits."""
        with Image.open(self.path / self._names[index]) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16") or (image.mode == "I" and opened.format == "PNG"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError("pixels of 32 bits have no agreed range; convert the image to 8 or 16 bits")
            return image.convert(self._mode)


@dataclass(kw_only=True, eq=False)
class FolderDataModule(ImageDataModule):
    """Images of one's own: every picture below a folder.

    Args:
        path: the folder.
    """

    path: str

    def load_source(self) -> Source:
        return Folder(path=self.path, in_chans=self.in_chans)


def _image_names(root: Path) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}; mend its permissions")

    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:  # a link back to where the walk has been
            subfolders.clear()
            continue
        seen.add(place)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root)  # noqa: PTH118
