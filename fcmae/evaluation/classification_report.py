"""What a classifier did, as tables and a picture.

Shapes: C classes.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fcmae.errors import UserError
from fcmae.files import atomic_writer, write_text

WORDING = {
    "loss": "loss",
    "acc1": "top-1 accuracy",
    "balanced_accuracy": "balanced accuracy",
    "acc5": "top-5 accuracy",
    "ece": "calibration error",
    "map": "mean average precision",
    "f1_micro": "F1, all labels alike",
    "f1_macro": "F1, mean of the classes",
}
MOST_NUMBERED, MOST_NAMED = 20, 40  # classes of which the picture has room for shares, and for names
LONGEST_NAME = 32  # characters of a name in the picture
SHARES = {0: "0", 0.01: "1%", 0.05: "5%", 0.1: "10%", 0.25: "25%", 0.5: "50%", 1: "100%"}  # beside its colours


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassificationReport:
    """What a classifier did on a data set. A number that is undefined, 0 / 0, is NaN here and missing in the files.

    Args:
        class_names: C names.
        images: how many had a label.
        metrics: as `ClassificationMetrics.summary` gives them.
        per_class: a column per key, of C numbers.
        confusion: (C, C) int64, how many images of class [row] were taken for [column]; None where an image may have
            several classes, or there are too many of them.
    """

    class_names: tuple[str, ...]
    images: int
    metrics: dict[str, float]
    per_class: dict[str, list[float]]
    confusion: Tensor | None

    def save(self, folder: Path) -> str | None:
        """Writes `metrics.json` and `per_class.csv`, and of the confusions `confusion.csv` and `confusion.png`.

        Returns:
            Why there is no picture, where matplotlib is missing; else None.

        Raises:
            UserError: a file cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}; name another one") from error
        finite = {name: value if math.isfinite(value) else None for name, value in self.metrics.items()}
        write_text(folder / "metrics.json", json.dumps({"images": self.images, **finite}, indent=2) + "\n")
        # Names of folders may hold bytes that are no UTF-8.
        names = [name.encode(errors="backslashreplace").decode() for name in self.class_names]
        columns: dict[str, Sequence[Any]] = {"class": names, **self.per_class}
        if self.confusion is not None:
            columns |= _most_confused(self.confusion, names)
        _write_csv(folder / "per_class.csv", columns, zip(*columns.values(), strict=True))
        if self.confusion is None:
            for name in ("confusion.csv", "confusion.png"):
                (folder / name).unlink(missing_ok=True)  # of an earlier report
            return None
        rows = ([name, *counts] for name, counts in zip(names, self.confusion.tolist(), strict=True))
        _write_csv(folder / "confusion.csv", ["true class", *names], rows)
        return _draw(self.confusion, names, folder / "confusion.png")

    def lines(self) -> list[str]:
        """The main numbers for people, a line each."""
        shown = {"images": str(self.images)}
        for name, value in self.metrics.items():
            shown[WORDING[name]] = f"{value:.4f}" if name == "loss" else f"{value:.2%}"
        width = max(map(len, shown))
        return [f"{name:<{width}}  {value:>8}" for name, value in shown.items()]


def _most_confused(confusion: Tensor, names: Sequence[str]) -> dict[str, list[Any]]:
    """For each class, the other one that its images were most often taken for, and how many of them were."""
    counts, others = (confusion - confusion.diag().diag()).max(1)
    chosen = [names[other] if count else "" for count, other in zip(counts.tolist(), others.tolist(), strict=True)]
    return {"most_confused_with": chosen, "images_confused": counts.tolist()}


def _write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(map(_cell, row) for row in rows)
    write_text(path, text.getvalue())


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"


def _draw(confusion: Tensor, names: Sequence[str], path: Path) -> str | None:
    """Draws each row as shares of the true class; says why, if it cannot."""
    try:
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        path.unlink(missing_ok=True)  # of an earlier report
        return f"{path.name} needs matplotlib: pip install 'fcmae[bench]' ({error})"
    count, support = len(names), confusion.sum(1, keepdim=True)
    shares = (confusion / support).numpy()  # NaN where the class has no images
    labels = [_short(name) for name in names] if count <= MOST_NAMED else []
    side = min(12.0, max(3.0, 0.36 * count)) if labels else 8.0  # inches
    margin = 0.09 * max(map(len, labels), default=0)
    figure = Figure(figsize=(side + margin + 1.6, side + margin + 0.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    # The root makes rare confusions visible.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
    axes.set_facecolor("#cbd5e0")  # shows where there is NaN
    grey = "" if support.all() else "; grey: classes without images"
    axes.set_title(f"{int(support.sum())} images, {count} classes{grey}", fontsize=10)
    axes.set(xlabel="predicted", ylabel="true class")
    bar = figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    bar.set_ticks(list(SHARES), labels=list(SHARES.values()), fontsize=8)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(labels)), labels, fontsize=8, parse_math=False)
    if count <= MOST_NUMBERED:
        for row, column in confusion.nonzero().tolist():
            share = shares[row, column]
            ink = "white" if share > 0.3 else "black"
            axes.text(column, row, f"{share:.0%}", color=ink, fontsize=6, ha="center", va="center")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    with atomic_writer(path) as target:
        target.write(file.getvalue())
    return None


def _short(name: str) -> str:
    """A name on one line; of a long one both ends, since names may differ in either."""
    name = " ".join(name.split())
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[1 - half :]}"
