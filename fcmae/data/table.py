"""Images and their labels in a table: one class per image, or any number of them."""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fcmae.data.folder import Folder
from fcmae.data.image_lists import IMAGE_COLUMNS
from fcmae.data.labelled import LabelledDataModule
from fcmae.data.source import check_channels, spelled_plainly
from fcmae.errors import UserError

_SPLITS = {"train": False, "val": True}


class Table(Folder):
    """The images that a CSV file lists: columns `image` or else `path`, `label`, and perhaps `split` (train or val).

    Args:
        path: folder that the paths in the table start from.
        table: the file, in UTF-8.
        multi_label: whether `label` holds any number of classes, separated by semicolons.
        in_chans: 1 for grey, 3 for RGB, any other number for what the files have.

    Raises:
        UserError: the file or a column is missing, a line lacks an image or a label or has more cells than columns, a
            quotation mark is never closed, a split is unknown, an image stands there twice, a class is spelled in
            two ways, there is no image, there are fewer than two classes, or none of the first images exists.
    """

    def __init__(self, *, path: str | Path, table: str | Path, multi_label: bool, in_chans: int) -> None:
        self.table = Path(table).expanduser()
        self._multi_label = multi_label
        self._labels: list[list[str]] = []
        self._held_out: list[int] = []
        super().__init__(path=path, in_chans=in_chans)
        self.class_names = sorted({name for names in self._labels for name in names})
        if len(self.class_names) < 2:
            raise UserError(f"{self.table} names {len(self.class_names)} classes, at least 2 are needed")
        index_of = {name: index for index, name in enumerate(self.class_names)}
        if multi_label:
            self.labels = torch.zeros(len(self._labels), len(self.class_names), dtype=torch.bool)
            for row, names in enumerate(self._labels):
                self.labels[row, [index_of[name] for name in names]] = True
        else:
            self.labels = torch.tensor([index_of[names[0]] for names in self._labels])
        self.held_out = self._held_out or None

    def find_names(self) -> list[str]:
        """The images in the order of the table, checked line by line."""
        try:
            with self.table.open(newline="", encoding="utf-8-sig") as file:
                rows = csv.DictReader(file, strict=True)  # else a stray quotation mark swallows lines
                try:
                    return self._read(rows)
                except csv.Error as error:
                    raise UserError(
                        f"{self.table}, after line {rows.line_num}: {error}: mend the quotation marks"
                    ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.table={self.table} cannot be read ({error}): name a CSV file in UTF-8") from error

    def _read(self, rows: "csv.DictReader[str]") -> list[str]:
        image_column, label_column = self._column(rows, IMAGE_COLUMNS), self._column(rows, ["label"])
        base = os.path.join(os.path.abspath(self.path), "")  # noqa: PTH100, PTH118
        names: dict[str, None] = {}
        spelled: dict[str, tuple[str, int]] = {}  # as it stands in the first line that has it
        for row in rows:
            where = f"{self.table}, line {rows.line_num}"
            if any(row.get(None, [])):  # a label would be read from the wrong place
                raise UserError(
                    f"{where}: there are more cells than columns: put quotation marks around what holds a comma"
                )
            name, split = (row[image_column] or "").strip(), (row.get("split") or "").strip() or "train"
            label = (row[label_column] or "").strip()
            labels = [part.strip() for part in label.split(";") if part.strip()] if self._multi_label else [label]
            if not name or (not self._multi_label and not label):
                raise UserError(f"{where}: an image and a label are needed, found {name!r} and {label!r}")
            if not self._multi_label and ";" in label:
                raise UserError(f"{where}: {label!r} are several labels; add data.multi_label=true, or leave one")
            if split not in _SPLITS:
                raise UserError(f"{where}: split {split!r} is unknown: use train or val")
            name = os.path.normpath(name).removeprefix(base)  # one name, however it is written
            if name in names:
                raise UserError(f"{where}: {name} stands there a second time: remove the line")
            for label in labels:
                first, line = spelled.setdefault(spelled_plainly(label), (label, rows.line_num))
                if first != label:
                    raise UserError(f"{where}: class {label!r} is {first!r} in line {line}: write both in one way")
            if _SPLITS[split]:
                self._held_out.append(len(names))
            names[name] = None
            self._labels.append(labels)
        if not names:
            raise UserError(f"{self.table} lists no image: add a line for each")
        if not any((self.path / name).is_file() for name in list(names)[:100]):
            raise UserError(
                f"{self.path / next(iter(names))} of {self.table} does not exist: name its folder in data.path"
            )
        return list(names)

    def _column(self, rows: "csv.DictReader[str]", wanted: Sequence[str]) -> str:
        columns = rows.fieldnames or []
        for name in wanted:
            if name in columns:
                return name
        names, found = " or ".join(map(repr, wanted)), ", ".join(columns) or "none"
        raise UserError(f"{self.table} has no column {names}, only {found}: name it in line 1")


@dataclass(kw_only=True, eq=False)
class TableDataModule(LabelledDataModule):
    """Images of one's own, their labels in a CSV file.

    Args:
        path: folder that the paths in the table start from.
        table: the file, with columns `image` (or `path`), `label` and perhaps `split`.
        multi_label: whether an image may have any number of labels, separated by semicolons.
    """

    path: str
    table: str
    multi_label: bool

    def load_source(self) -> Table:
        source = Table(path=self.path, table=self.table, multi_label=self.multi_label, in_chans=self.in_chans)
        check_channels(source)
        return source
