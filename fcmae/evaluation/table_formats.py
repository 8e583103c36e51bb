"""What a row of a table is in CSV, JSON lines, Parquet and .npy.

Shapes: N rows, D features.
"""

import csv
import json
import os
from contextlib import suppress
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

_VALUES_PER_GROUP = 2**19  # Parquet holds a group of rows in memory until it is full


class Row(Protocol):
    """The shape of a kind of rows."""

    columns: list[str]
    """Of CSV."""

    def flat(self, image: str, values: Any) -> list[Any]:
        """The cells of CSV."""

    def nested(self, image: str, values: Any) -> dict[str, Any]:
        """The object of JSON lines."""

    def typed(self, image: str, values: Any) -> dict[str, Any]:
        """The cells of Parquet."""

    def schema(self, arrow: Any) -> Any:
        """The columns of Parquet; `arrow` is pyarrow."""


class Prediction:
    """The likeliest classes of an image; its values are pairs of a name and a probability.

    Args:
        top_k: how many pairs.
    """

    def __init__(self, top_k: int) -> None:
        pairs = [(f"class_{rank}", f"probability_{rank}") for rank in range(1, top_k + 1)]
        self.columns = ["image", *(column for pair in pairs for column in pair)]

    def flat(self, image: str, values: Any) -> list[Any]:
        return [image, *(value for pair in values for value in pair)]

    def nested(self, image: str, values: Any) -> dict[str, Any]:
        return {"image": image, "predictions": [{"class": name, "probability": share} for name, share in values]}

    def typed(self, image: str, values: Any) -> dict[str, Any]:
        return dict(zip(self.columns, self.flat(image, values), strict=True))

    def schema(self, arrow: Any) -> Any:
        numbers = {column: column.startswith("probability") for column in self.columns}
        return arrow.schema([(column, "float32" if number else "string") for column, number in numbers.items()])


class Feature:
    """The features of an image; its values are (D,) float32.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.columns = ["image", *(f"feature_{index}" for index in range(width))]

    def flat(self, image: str, values: Any) -> list[Any]:
        return [image, *shortest(values)]

    def nested(self, image: str, values: Any) -> dict[str, Any]:
        return {"image": image, "features": shortest(values)}

    def typed(self, image: str, values: Any) -> dict[str, Any]:
        return {"image": image, "features": values}

    def schema(self, arrow: Any) -> Any:
        return arrow.schema([("image", "string"), ("features", arrow.list_(arrow.float32(), self.width))])


class Csv:
    """Rows of cells, under a row of names."""

    def __init__(self, file: BinaryIO, row: Row) -> None:
        self._row = row
        self._writer = csv.writer(_Text(file), lineterminator="\n")
        self._writer.writerow(row.columns)

    def write(self, image: str, values: Any) -> None:
        """Adds a row."""
        self._writer.writerow(self._row.flat(image, values))

    def finish(self, *, complete: bool) -> None:
        """There is nothing left to do."""


class JsonLines:
    """An object per line."""

    def __init__(self, file: BinaryIO, row: Row) -> None:
        self._file, self._row = file, row

    def write(self, image: str, values: Any) -> None:
        """Adds a row."""
        text = json.dumps(self._row.nested(image, values), ensure_ascii=False)
        self._file.write(f"{text}\n".encode())

    def finish(self, *, complete: bool) -> None:
        """There is nothing left to do."""


class Parquet:
    """Typed columns, compressed."""

    def __init__(self, file: BinaryIO, row: Row) -> None:
        import pyarrow
        from pyarrow.parquet import ParquetWriter

        self._row, self._schema = row, row.schema(pyarrow)
        self._writer = ParquetWriter(file, self._schema)
        self._make_table = pyarrow.Table.from_pylist
        self._rows: list[dict[str, Any]] = []
        self._most = max(1, _VALUES_PER_GROUP // len(row.columns))

    def write(self, image: str, values: Any) -> None:
        """Adds a row, sooner or later."""
        self._rows.append(self._row.typed(image, values))
        if len(self._rows) >= self._most:
            self._write_group()

    def finish(self, *, complete: bool) -> None:
        """Writes the last group and the index; of a table that is given up, lets go of the file."""
        if complete:
            self._write_group()
            self._writer.close()
        else:
            with suppress(Exception):  # it writes an index even then, and the disk may be full
                self._writer.close()

    def _write_group(self) -> None:
        self._writer.write_table(self._make_table(self._rows, schema=self._schema))
        self._rows = []


class Array:
    """An array (N, D) of float32 in numpy's format, and a CSV file that names its rows."""

    def __init__(self, file: BinaryIO, names: BinaryIO, width: int) -> None:
        self._file, self._width, self._count = file, width, 0
        self._names = csv.writer(_Text(names), lineterminator="\n")
        self._names.writerow(["image"])
        self._write_header()

    def write(self, image: str, values: npt.NDArray[np.float32]) -> None:
        """Adds a row."""
        self._file.write(values.astype("<f4").tobytes())
        self._names.writerow([image])
        self._count += 1

    def finish(self, *, complete: bool) -> None:
        """Writes the number of rows to where it belongs, at the start."""
        if complete:
            end = self._file.tell()
            self._file.seek(0)
            self._write_header()
            self._file.seek(end)
            # Before the file of names gets to its place, so that what can still fail is a mere renaming.
            self._file.flush()
            os.fsync(self._file.fileno())

    def _write_header(self) -> None:
        # numpy leaves room in it for larger numbers of rows.
        header = {"descr": "<f4", "fortran_order": False, "shape": (self._count, self._width)}
        np.lib.format.write_array_header_1_0(self._file, header)


def shortest(values: npt.NDArray[np.float32]) -> list[float]:
    """The shortest decimals that are these numbers in float32: 0.1, not 0.10000000149."""
    return values.astype(str).astype(np.float64).tolist()


class _Text:
    """What the csv module takes for a file: encodes what it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        self._file.write(text.encode())
