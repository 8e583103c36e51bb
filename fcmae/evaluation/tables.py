"""Tables of predictions and of features, written as they come; a table is there whole or not at all.

Shapes: B images of a batch, N of all, D features.
"""

import difflib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fcmae.errors import UserError
from fcmae.evaluation.table_formats import Array, Csv, Feature, JsonLines, Parquet, Prediction, shortest
from fcmae.files import atomic_writer

_Format = Csv | JsonLines | Parquet
_FORMATS: dict[str, type[_Format]] = {".csv": Csv, ".jsonl": JsonLines, ".parquet": Parquet}
PREDICTIONS = tuple(_FORMATS)
FEATURES = (*_FORMATS, ".npy")


def check_table(path: Path, endings: Sequence[str]) -> None:
    """Refuses, before any work, a file that could not be written after it.

    Args:
        path: where the table is to be.
        endings: `PREDICTIONS` or `FEATURES`.

    Raises:
        UserError: its ending is none of these, a package is missing, or it is a folder.
    """
    ending = path.suffix.lower()
    if ending not in endings:
        close = difflib.get_close_matches(ending, endings, n=1)
        hint = f"; did you mean {path.with_suffix(close[0])}?" if close else ""
        raise UserError(f"{path} is no table: its name must end in {', '.join(endings)}{hint}")
    if ending == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{path} needs pyarrow: pip install 'fcmae[parquet]', or name a file ending in .csv")
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file, such as {path / f'table{ending}'}")


def names_beside(path: Path) -> Path:
    """Where the names of the rows of a .npy file are: a CSV file with the column image."""
    return path.with_name(f"{path.name}.images.csv")


class PredictionTable:
    """Takes the likeliest classes of one image after the other."""

    def __init__(self, path: Path, file: BinaryIO, top_k: int) -> None:
        self._path, self._top_k = path, top_k
        with _writing(path):
            self._rows = _FORMATS[path.suffix.lower()](file, Prediction(top_k))

    def write(self, image: str, ranked: Sequence[tuple[str, float]]) -> None:
        """Adds a row.

        Args:
            image: its name.
            ranked: `top_k` pairs of a class and its probability, the likeliest first. Probabilities become float32.

        Raises:
            UserError: it cannot be written, or a probability is not finite.
        """
        assert len(ranked) == self._top_k, f"{len(ranked)} classes, not {self._top_k}"
        classes, shares = [_encodable(name) for name, _ in ranked], np.array([share for _, share in ranked], np.float32)
        _check_finite(image, shares)
        with _writing(self._path):
            self._rows.write(_encodable(image), list(zip(classes, shortest(shares), strict=True)))

    def finish(self, *, complete: bool) -> None:
        """Writes what is left to be written, if all rows are there."""
        with _writing(self._path):
            self._rows.finish(complete=complete)


class FeatureTable:
    """Takes the features of images, batch by batch."""

    def __init__(self, path: Path, file: BinaryIO, names: BinaryIO | None = None) -> None:
        self._path, self._file, self._names = path, file, names
        self._width = 0
        self._rows: _Format | Array | None = None

    def write(self, images: Sequence[str], values: npt.NDArray[Any]) -> None:
        """Adds rows.

        Args:
            images: B names.
            values: (B, D); they become float32.

        Raises:
            UserError: they cannot be written, or a value is not finite.
        """
        assert values.ndim == 2, f"features of shape {values.shape}"
        assert len(values) == len(images), f"features of {len(values)} images, names of {len(images)}"
        with _writing(self._path):
            if self._rows is None:
                self._width = values.shape[1]
                self._rows = self._start(self._width)
            assert values.shape[1] == self._width, f"{values.shape[1]} features, not {self._width}"
            for image, row in zip(images, values.astype(np.float32), strict=True):
                _check_finite(image, row)
                self._rows.write(_encodable(image), row)

    def finish(self, *, complete: bool) -> None:
        """Writes what is left to be written, if all rows are there.

        Raises:
            UserError: it cannot be written, or there are no rows.
        """
        if self._rows is not None:
            with _writing(self._path):
                self._rows.finish(complete=complete)
        elif complete:
            raise UserError(f"{self._path} would be empty: there was no image that could be read")

    def _start(self, width: int) -> _Format | Array:
        if self._names is not None:
            return Array(self._file, self._names, width)
        return _FORMATS[self._path.suffix.lower()](self._file, Feature(width))


@contextmanager
def open_predictions(path: Path, *, top_k: int) -> Iterator[PredictionTable]:
    """A table of classes that becomes `path` when the block ends well; else whatever stood there stays.

    In CSV and Parquet the columns are image, class_1, probability_1, class_2, ...; a line of JSON is
    {"image": ..., "predictions": [{"class": ..., "probability": ...}, ...]}.

    Args:
        path: its ending, one of `PREDICTIONS`, says what it becomes.
        top_k: classes per image.

    Raises:
        UserError: as `check_table`, or it cannot be written.
    """
    check_table(path, PREDICTIONS)
    with _file(path) as file, _finishing(PredictionTable(path, file, top_k)) as table:
        yield table


@contextmanager
def open_features(path: Path) -> Iterator[FeatureTable]:
    """A table of features that becomes `path` when the block ends well; else whatever stood there stays.

    In CSV the columns are image, feature_0, feature_1, ...; in Parquet image and features, a list of D float32; a line
    of JSON is {"image": ..., "features": [...]}; .npy is an array (N, D) of float32, and `names_beside(path)` names its
    rows.

    Args:
        path: its ending, one of `FEATURES`, says what it becomes.

    Raises:
        UserError: as `check_table`, there were no rows, or it cannot be written.
    """
    check_table(path, FEATURES)
    if path.suffix.lower() != ".npy":
        with _file(path) as file, _finishing(FeatureTable(path, file)) as table:
            yield table
        return
    # The names' file is closed first, so that they are in place before the array is.
    with (
        _file(path) as file,
        _file(names_beside(path)) as names,
        _finishing(FeatureTable(path, file, names)) as table,
    ):
        yield table


@contextmanager
def _finishing(table: Any) -> Iterator[Any]:
    complete = False
    try:
        yield table
        complete = True
    finally:
        table.finish(complete=complete)


@contextmanager
def _file(path: Path) -> Iterator[BinaryIO]:
    """`atomic_writer`, except that an OSError from the block's other work is not told as one of writing."""
    others: list[OSError] = []
    try:
        with atomic_writer(path) as file:
            try:
                yield file
            except OSError as error:
                others.append(error)
                raise
    except UserError:
        if others:
            raise others[0] from None
        raise


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; free space or mend permissions there") from error


def _check_finite(image: str, values: npt.NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise UserError(f"{image}: the model gives NaN or infinity, it has diverged; use an earlier checkpoint")


def _encodable(name: str) -> str:
    """Names of files may hold bytes that are no UTF-8; they become escapes that can be read."""
    return name.encode(errors="backslashreplace").decode()
