"""A folder per class: DIR/train/<class>/... and DIR/val/<class>/..., or DIR/<class>/... alone."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePath

import torch

from fcmae.data.folder import Folder
from fcmae.data.labelled import LabelledDataModule
from fcmae.data.names import Names
from fcmae.data.source import check_channels
from fcmae.errors import UserError


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
        super().__init__(path=path, in_chans=in_chans)
        parted = (self.path / "train").is_dir()
        if (self.path / "val").is_dir() and not parted:
            raise UserError(f"data.path={path} holds val but no train: name the folder that holds both")
        train = self.path / "train" if parted else self.path
        self.class_names = sorted(
            folder.name for folder in train.iterdir() if folder.is_dir() and not folder.name.startswith(".")
        )
        if len(self.class_names) < 2:
            raise UserError(
                f"{train} holds {len(self.class_names)} folders of classes, at least 2 are needed: "
                "put the images of each class in a folder named after it"
            )
        depth = 1 if parted else 0
        self._names = Names(name for name in self._names if _belongs(PurePath(name).parts, parted))
        classes = {name: index for index, name in enumerate(self.class_names)}
        found = [PurePath(name).parts[depth] for name in self._names]
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
        held_out = [index for index, name in enumerate(self._names) if parted and PurePath(name).parts[0] == "val"]
        if parted and (self.path / "val").is_dir() and not held_out:
            raise UserError(f"{self.path / 'val'} holds no image of a class: fill it, or remove it")
        self.held_out = held_out or None


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


def _belongs(parts: tuple[str, ...], parted: bool) -> bool:
    """Whether a path is one of a class's folder, not a stray image beside the classes."""
    return len(parts) > 2 and parts[0] in ("train", "val") if parted else len(parts) > 1


def _listed(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
