"""What the columns of a Hugging Face data set hold: the images, and perhaps their classes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fcmae.data.decoding import open_picture
from fcmae.data.picture import Picture
from fcmae.data.source import spelled_plainly
from fcmae.errors import UserError

_TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # either order of bytes, small and big
_EXTENSIONS = {**dict.fromkeys(_TIFFS, ".tiff"), b"\x93NUM": ".npy"}  # by first bytes; PIL knows all others


class Columns(NamedTuple):
    """Which columns to read."""

    image: str
    label: str | None
    """None: the images have no labels."""


def choose_columns(features: Mapping[str, Any], *, image_column: str, label_column: str | None) -> Columns:
    """The columns asked for, or found by their types.

    Args:
        features: of the data set, by column.
        image_column: a name, or `auto`: the only column of images.
        label_column: a name; `auto`: the only column of classes, else one named label or labels; None or `none`.

    Raises:
        UserError: no such column, one of another type, or not just one to choose from.
    """
    image = image_column
    if image == "auto":
        image = _only([name for name in features if _holds_images(features[name])], "image", features)
    elif image not in features or not _holds_images(features[image], named=True):
        raise UserError(f"data.image_column={image} is no column of images: the columns are {_listed(features)}")
    if label_column in (None, "none"):
        return Columns(image, None)
    if label_column != "auto":
        if label_column not in features or not _holds_labels(features[label_column]):
            raise UserError(
                f"data.label_column={label_column} is no column of classes, integers or strings: "
                f"the columns are {_listed(features)}"
            )
        return Columns(image, label_column)
    found = [name for name in features if hasattr(features[name], "names")] or [
        name for name in ("label", "labels") if name in features and _holds_labels(features[name])
    ]
    return Columns(image, _only(found, "label", features) if found else None)


def encode_labels(columns: Sequence[Any], feature: Any, *, name: str) -> tuple[list[str], Tensor]:
    """A column of labels to (class names, (N,) int64).

    Args:
        columns: `pyarrow.ChunkedArray`s, one after another.
        feature: of the column; if it does not name the classes, they are the values found.
        name: of the column.

    Raises:
        UserError: an image without a label, a class that is spelled in two ways, or fewer than two classes.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = pa.string() if getattr(feature, "dtype", "") in ("string", "large_string") else pa.int64()
    values = pa.chunked_array([chunk.cast(kind) for column in columns for chunk in column.chunks], type=kind)
    class_names: list[str] | None = getattr(feature, "names", None)
    if class_names is None:
        found = sorted(values.unique().drop_null().to_pylist())
        class_names = [str(value) for value in found]
        spelled: dict[str, str] = {}
        for class_name in class_names:
            first = spelled.setdefault(spelled_plainly(class_name), class_name)
            if first != class_name:
                one, other = (f"{each!r} (row {pc.index(values, each).as_py() + 1})" for each in (first, class_name))
                raise UserError(f"data.label_column={name}: {one} and {other} are one class: write both in one way")
        values = pc.index_in(values, value_set=pa.array(found, type=kind), skip_nulls=True)
    labels = torch.tensor(values.fill_null(-1).to_numpy(), dtype=torch.int64)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(class_names):
        missing = int(((labels < 0) | (labels >= len(class_names))).sum())
        raise UserError(
            f"data.label_column={name}: {missing} of {len(labels)} images have no label (null, or -1): "
            "choose other splits, or set data.label_column=none"
        )
    if len(class_names) < 2:
        raise UserError(
            f"data.label_column={name} names {len(class_names)} classes, at least 2 are needed: "
            "name another column, or set data.label_column=none"
        )
    return list(class_names), labels


def stored_picture(value: Any, *, in_chans: int) -> Picture:
    """The picture that is stored in a cell: as a file's bytes, or as {"bytes", "path"} of which one may be null.

    Args:
        value: of the cell.
        in_chans: channels to give.

    Raises:
        Exception: whatever the decoder raises on a broken file; ValueError, if the cell is empty.
    """
    cell: dict[str, Any] = value if isinstance(value, dict) else {"bytes": value}
    content, path = cell.get("bytes"), cell.get("path")
    if content is not None:
        return open_picture(content, name=path or f"image{_EXTENSIONS.get(content[:4], '')}", in_chans=in_chans)
    if path is None:
        raise ValueError("no image is stored")
    return open_picture(Path(path), name=path, in_chans=in_chans)


def _holds_images(feature: Any, *, named: bool = False) -> bool:
    """By its type; a column that is named may also hold files as plain bytes."""
    if isinstance(feature, dict):
        return named and "bytes" in feature
    return type(feature).__name__ == "Image" or (named and getattr(feature, "dtype", "") in ("binary", "large_binary"))


def _holds_labels(feature: Any) -> bool:
    kind = str(getattr(feature, "dtype", ""))
    return hasattr(feature, "names") or kind in ("string", "large_string") or kind.startswith(("int", "uint"))


def _only(found: Sequence[str], what: str, features: Mapping[str, Any]) -> str:
    if len(found) != 1:
        several = f"several columns may hold the {what}s ({', '.join(found)})" if found else f"no column holds {what}s"
        none = " or none" if what == "label" else ""
        raise UserError(
            f"data.{what}_column=auto: {several}: name one{none} in data.{what}_column, of {_listed(features)}"
        )
    return found[0]


def _listed(features: Mapping[str, Any]) -> str:
    return ", ".join(features)
