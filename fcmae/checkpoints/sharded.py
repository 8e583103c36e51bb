"""Checkpoints in a folder: every rank writes its rows of the tensors that are sharded, the first one all the rest.

    epoch=0002-step=00000600.ckpt/
      rank-00000.safetensors ...    rows of each sharded tensor; one rank's follow the other's
      rest.ckpt                     the checkpoint as one file holds it, but with the shapes of those tensors alone

torch.distributed.checkpoint would write a pickle beside its files, which may run anything when it is read.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fcmae.errors import UserError
from fcmae.files import atomic_writer, exists, sync_folder

REST = "rest.ckpt"
_SIZES = "sharded_files"
"""In the rest: name and bytes of each rank's file."""


class Rows:
    """A tensor whose rows lie in several files. `rows[2:5]` reads those three, `rows[:]` all.

    Args:
        pieces: of the tensor, one file's after the other's: what safetensors calls slices.
        like: a tensor of its shape, type and layout, without content.
    """

    def __init__(self, pieces: Sequence[Any], like: Tensor) -> None:
        self.pieces = pieces
        self.like = like
        self.shape = like.shape

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        found, first = [torch.empty((0, *self.shape[1:]), dtype=self.like.dtype)], 0
        for piece in self.pieces:
            count = piece.get_shape()[0]
            begin, end = max(start - first, 0), min(stop - first, count)
            if begin < end:
                found.append(piece[begin:end])
            first += count
        return torch.cat(found)


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint is such a folder."""
    return exists(path / REST)


def replaced(tree: Any, replace: Callable[[str, Any], Any], name: str = "") -> Any:
    """The same dictionaries and lists with `replace(name, value)` for each value in them; its name is its path."""
    if isinstance(tree, Mapping):
        return {key: replaced(value, replace, f"{name}/{key}") for key, value in tree.items()}
    if isinstance(tree, list):
        return [replaced(value, replace, f"{name}/{index}") for index, value in enumerate(tree)]
    return replace(name, tree)


def write_rank(folder: Path, rank: int, tensors: dict[str, Tensor]) -> tuple[str, int]:
    """Writes one rank's rows; returns the name of the file and its bytes.

    Args:
        folder: the same for all ranks.
        rank: from 0.
        tensors: rows by the path of their tensor in the checkpoint, see `replaced`.

    Raises:
        UserError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, content = f"rank-{rank:05d}.safetensors", save(tensors)
    with atomic_writer(folder / name) as file:
        file.write(content)
    return name, len(content)


def finish(folder: Path, path: Path, rest: dict[str, Any], sizes: dict[str, int]) -> None:
    """Writes the rest and, once all is there, renames the folder to `path`; so a kill leaves the one before.

    Args:
        folder: with all ranks' files.
        path: of the checkpoint.
        rest: the checkpoint with tensors on `meta` for those that the ranks have written.
        sizes: name and bytes of each rank's file.

    Raises:
        UserError: a rank's file is not there, or the rest cannot be written.
    """
    for name in sizes:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is not there: run_dir must be on a file system that all nodes share")
    with atomic_writer(folder / REST) as file:
        torch.save(rest | {_SIZES: sizes}, file)
    remove(path)
    folder.rename(path)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Removes a checkpoint, be it a file or a folder; one that is half removed is not taken for a checkpoint."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    (path / REST).unlink(missing_ok=True)
    shutil.rmtree(path)


def read_sharded(folder: Path) -> dict[str, Any]:
    """The checkpoint in a folder, with `Rows` for the tensors that are sharded; they are read when they are asked for.

    Raises:
        UserError: a file is missing or damaged; names it.
    """
    rest: dict[str, Any] = torch.load(folder / REST, map_location="cpu", weights_only=True, mmap=True)
    files = []
    for name, size in rest.pop(_SIZES).items():
        file = folder / Path(name).name
        found = file.stat().st_size if exists(file) else None
        if found != size:
            what = "is missing" if found is None else f"has {found:,} bytes of {size:,}"
            raise UserError(f"{file} {what}: copy it back, or take the checkpoint before")
        files.append(safe_open(file, framework="pt"))
    names = [set(file.keys()) for file in files]

    def rows(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        return Rows([file.get_slice(name) for file, known in zip(files, names, strict=True) if name in known], value)

    checkpoint: dict[str, Any] = replaced(rest, rows)
    return checkpoint


def assemble(checkpoint: Any) -> Any:
    """A checkpoint, or part of one, with whole tensors for `Rows`."""
    return replaced(checkpoint, lambda name, value: value[:] if isinstance(value, Rows) else value)
