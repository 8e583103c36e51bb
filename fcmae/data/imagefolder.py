"""A folder per class: DIR/train/<class>/... and DIR/val/<class>/..., or DIR/<class>/... alone."""

import logging
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from fcmae.data.folder import Folder, image_names
from fcmae.data.labelled import LabelledDataModule
from fcmae.data.names import Names
from fcmae.data.source import check_channels
from fcmae.errors import UserError

log = logging.getLogger(__name__)

_OTHER_NAMES = ("valid", "validation", "test")
"""Of the part that is to validate with, where others than ImageNet's are meant."""


class ImageFolder(Folder):
    """The images below a folder, their classes by the names of the folders that they lie in.

    Args:
        path: the folder. With `train` and `val` in it, images below `train` are to learn from and images below `val`
            to validate with; other folders beside these two are left alone. Otherwise its folders are the classes.
        in_chans: 1 for grey, 3 for RGB, any other number for what the files have.

    Raises:
        UserError: as `Folder`; one class only; a class to validate with that there is none of to learn from, or an
            empty folder of a class.
    """

    def __init__(self, *, path: str | Path, in_chans: int) -> None:
        folder = Path(path).expanduser()
        self._parts = _parts(folder)
        super().__init__(path=folder, in_chans=in_chans)
        train = self.path / "train" if self._parts else self.path
        self.class_names = sorted(
            folder.name for folder in train.iterdir() if folder.is_dir() and not folder.name.startswith(".")
        )
        if len(self.class_names) < 2:
            raise UserError(
                f"{train} holds {len(self.class_names)} folders of classes, at least 2 are needed: "
                "put the images of each class in a folder named after it"
            )
        classes = {name: index for index, name in enumerate(self.class_names)}
        depth = 1 if self._parts else 0
        stray = [name for name in self._names if name.count(os.sep) <= depth]
        if stray:
            log.warning("images in no class's folder, left out: %d, the first %s", len(stray), self.path / stray[0])
        self._names = Names(name for name in self._names if name.count(os.sep) > depth)
        found = [name.split(os.sep, depth + 1)[depth] for name in self._names]
        unknown = sorted(set(found) - classes.keys())
        if unknown:
            raise UserError(
                f"class {unknown[0]!r} of {self.path / 'val'} has no folder in {train}: "
                f"the classes are {_listed(self.class_names)}"
            )
        counts = Counter(found)
        empty = [name for name in self.class_names if not counts[name]]
        if empty:
            raise UserError(f"{train / empty[0]} holds no image: add some, or remove the folder")
        self.labels = torch.tensor([classes[name] for name in found])
        held_out = [index for index, name in enumerate(self._names) if name.startswith(f"val{os.sep}")]
        if "val" in self._parts and not held_out:
            raise UserError(f"{self.path / 'val'} holds no image of a class: fill it, or remove it")
        self.held_out = held_out if self._parts and held_out else None

    def find_names(self) -> list[str]:
        """Of two parts each is looked through for itself: one may hold links into the other, or both into a third."""
        if not self._parts:
            return super().find_names()
        return sorted(name for part in self._parts for name in image_names(self.path / part, self.path, set()))


@dataclass(kw_only=True, eq=False)
class ImageFolderDataModule(LabelledDataModule):
    """Images of one's own, a folder per class.

    Args:
        path: the folder.
    """

    path: str

    def load_source(self) -> ImageFolder:
        source = ImageFolder(path=self.path, in_chans=self.in_chans)
        check_channels(source)
        return source


def _parts(folder: Path) -> list[str]:
    """The folders of images to learn from and to validate with; none where the folder holds the classes themselves."""
    if not (folder / "train").is_dir():
        if (folder / "val").is_dir():
            raise UserError(
                f"data.path={folder} holds val but no train: name the folder that holds both, or {folder / 'val'}"
            )
        return []
    if (folder / "val").is_dir():
        return ["train", "val"]
    classes = _folders(folder / "train")
    for other in _OTHER_NAMES:
        if classes & _folders(folder / other):
            log.warning(
                "%s holds train and %s, but no val: a part of train is held out to validate with; if %s is for that, "
                "rename it to val, or link it (ln -s %s val)",
                *(folder, other, other, other),
            )
            break
    return ["train"]


def _folders(path: Path) -> set[str]:
    """The names of the folders in one, if it is one that can be read."""
    with suppress(OSError):
        return {entry.name for entry in os.scandir(path) if entry.is_dir()}
    return set()


def _listed(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
