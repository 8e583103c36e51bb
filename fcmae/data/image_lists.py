"""Files that list images: `.txt`, a path per line; `.csv` and `.parquet`, a column of paths."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from fcmae.data.decoding import EXTENSIONS
from fcmae.errors import UserError, in_a_line

LIST_EXTENSIONS = (".csv", ".parquet", ".txt")
IMAGE_COLUMNS = ("image", "path")
"""Where a table's paths are: the first of these that it has."""


def read_list(file: Path) -> list[str]:
    """The paths that a file lists, as they stand there.

    Args:
        file: `.txt` in UTF-8, where blank lines and those that begin with # do not count; `.csv` in UTF-8 with names of
            columns in line 1, or `.parquet`: the column `image`, or else `path`, or else the only one.

    Raises:
        UserError: it cannot be read, has no such column, a cell is empty, or it lists no image.
    """
    read = {".csv": _read_csv, ".parquet": _read_parquet, ".txt": _read_lines}[file.suffix.lower()]
    try:
        paths = list(read(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"data.path={file} cannot be read ({reason}): name a list of images in UTF-8") from error
    if not paths:
        raise UserError(f"data.path={file} lists no image: add a path for each")
    return paths


def _read_lines(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8-sig") as lines:
        for line in lines:
            path = line.strip()
            if path and not path.startswith("#"):
                yield path


def _read_csv(file: Path) -> Iterator[str]:
    with file.open(newline="", encoding="utf-8-sig") as opened:
        rows = csv.reader(opened, strict=True)  # else a stray quotation mark swallows lines
        columns = next(rows, [])
        if any(name.lower().endswith(EXTENSIONS) for name in columns):
            raise UserError(
                f"data.path={file}: line 1 names an image, not the columns: put a line before it that says image"
            )
        place = columns.index(_column(file, columns))
        for row in rows:
            if row:
                yield _checked(row[place].strip() if place < len(row) else "", f"{file}, line {rows.line_num}")


def _read_parquet(file: Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowInvalid, parquet, types
    except ImportError as error:
        raise UserError(f"data.path={file}: to read Parquet needs pip install 'fcmae[parquet]'") from error
    try:
        with parquet.ParquetFile(file) as opened:
            schema = opened.schema_arrow
            column = _column(file, schema.names)
            kind = schema.field(column).type
            kind = kind.value_type if types.is_dictionary(kind) else kind
            if not (types.is_string(kind) or types.is_large_string(kind)):
                raise UserError(f"data.path={file}: column {column!r} holds {kind}, not paths: make it text")
            batches = opened.iter_batches(columns=[column])
            paths = (path for batch in batches for path in batch.column(0).to_pylist())
            for number, path in enumerate(paths, 1):
                yield _checked(path or "", f"{file}, row {number}")
    except ArrowInvalid as error:
        raise UserError(f"data.path={file} is no Parquet file ({in_a_line(error)}): write it anew") from error


def _column(file: Path, columns: Sequence[str]) -> str:
    for name in (*IMAGE_COLUMNS, *(columns if len(columns) == 1 else ())):
        if name in columns:
            return name
    wanted, found = " or ".join(map(repr, IMAGE_COLUMNS)), ", ".join(columns) or "none"
    raise UserError(f"data.path={file} has no column {wanted}, only {found}: name the one of paths")


def _checked(path: str, where: str) -> str:
    if not path:
        raise UserError(f"data.path={where}: no image is named: fill the cell, or remove the row")
    return path
