"""Any folders of images, recursively, images, and lists of images; no labels needed."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fcmae.data.datamodule import ImageDataModule
from fcmae.data.decoding import EXTENSIONS, open_picture
from fcmae.data.image_lists import LIST_EXTENSIONS, read_list
from fcmae.data.names import Names
from fcmae.data.picture import Picture
from fcmae.data.source import Source, check_channels
from fcmae.errors import UserError

_LOOKED_AT = 100
"""So many images at the start tell whether a list's paths are wrong altogether."""

log = logging.getLogger(__name__)


class Folder:
    """The images below a folder, in the order of their paths.

    Args:
        path: the folder. Links to folders are followed, each folder once; hidden files are left out.
        in_chans: 1 for grey, 3 for RGB, any other number for what the files have.
        names: the images to take, as paths that start from the folder; None for all below it.

    Raises:
        UserError: no such folder, one that cannot be read, or no image in it.
    """

    def __init__(self, *, path: str | Path, in_chans: int, names: Sequence[str] | None = None) -> None:
        self.path = Path(path).expanduser()
        self.in_chans = in_chans
        _check_is_folder(self.path)
        self._names: Sequence[str] = Names(self.find_names() if names is None else names)
        if not self._names:
            raise _no_image(self.path)

    def find_names(self) -> list[str]:
        """The paths of the images, below the folder."""
        return sorted(image_names(self.path, self.path, set()))

    def __len__(self) -> int:
        return len(self._names)

    def sample_id(self, index: int) -> str:
        """The path below the folder; bytes that are no UTF-8 as \\xff."""
        return self._names[index].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

    def open(self, index: int) -> Picture:
        """See `open_picture`."""
        name = self._names[index]
        return open_picture(self.path / name, name=name, in_chans=self.in_chans)


@dataclass(kw_only=True, eq=False)
class FolderDataModule(ImageDataModule):
    """Images of one's own: every picture below a folder, or those of a list.

    Args:
        path: a folder, an image, or a list of images as in `read_list`, whose paths start from its own folder; or
            several of them. An image given twice is taken once: else it might be learnt from and validated with.
    """

    path: str | Sequence[str]

    def load_source(self) -> Source:
        given = [self.path] if isinstance(self.path, str) else [str(path) for path in self.path]
        if not given:
            raise UserError("data.path=[] names nothing: give a folder of images, or several")
        root, names = find_images([Path(path).expanduser() for path in given])
        source = Folder(path=root, in_chans=self.in_chans, names=names)
        check_channels(source)
        return source


def find_images(given: Sequence[Path]) -> tuple[Path, list[str] | None]:
    """A folder, and the images as paths that start from it; None for all below it.

    The folder is the one given, or the list's, or the deepest one that holds all that is given. It does not depend on
    what is in them: so an image keeps its name when others come or go.

    Raises:
        UserError: something given does not exist or holds no image, or none of a list's first images exists.
    """
    given = sorted(given)  # whatever the order, the same names
    places = [path.parent if _is_image(path) or _is_list(path) else path for path in given]
    if len(given) == 1 and places == given:
        return given[0], None
    root = Path(os.path.commonpath([os.path.abspath(place) for place in places])) if len(given) > 1 else places[0]  # noqa: PTH100
    names: list[str] = []
    seen: set[str] = set()
    for path in given:
        if _is_list(path):
            names += _listed_names(path, root)
        elif _is_image(path):
            names.append(os.path.relpath(path, root))
        else:
            names += _folder_names(path, root, seen)
    unique = sorted(set(names))
    if len(unique) < len(names):
        log.warning("images given more than once, each taken once: %d", len(names) - len(unique))
    return root, unique


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and path.is_file()


def _is_list(path: Path) -> bool:
    return path.suffix.lower() in LIST_EXTENSIONS and path.is_file()


def _listed_names(file: Path, root: Path) -> list[str]:
    folder, base = os.path.abspath(file.parent), os.path.join(os.path.abspath(root), "")  # noqa: PTH100, PTH118
    files = [os.path.normpath(os.path.join(folder, path)) for path in read_list(file)]  # noqa: PTH118
    first = files[:_LOOKED_AT]
    if not any(map(os.path.isfile, first)):
        raise UserError(
            f"data.path={file}: none of its first {len(first)} images exists ({', '.join(first[:3])}): "
            f"its paths start from its own folder, {file.parent}"
        )
    return [path.removeprefix(base) if path.startswith(base) else os.path.relpath(path, base) for path in files]


def _folder_names(folder: Path, root: Path, seen: set[str]) -> list[str]:
    _check_is_folder(folder)
    names = list(image_names(folder, root, seen))
    if not names and next(image_names(folder, root, set()), None) is None:  # not because another one holds it
        raise _no_image(folder)
    return names


def _check_is_folder(path: Path) -> None:
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}: name a folder of images")


def _no_image(folder: Path) -> UserError:
    return UserError(f"{folder} holds no image: looked in all its folders for {', '.join(EXTENSIONS)}")


def image_names(folder: Path, root: Path, seen: set[str]) -> Iterator[str]:
    """The images below a folder, as paths that start from `root`; no folder that was seen, however it is reached.

    Raises:
        UserError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}; mend its permissions")

    for place, subfolders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link back to where the walk has been
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        start = os.path.relpath(place, root)
        for name in files:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield name if start == "." else os.path.join(start, name)  # noqa: PTH118
