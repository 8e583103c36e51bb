"""Files that a benchmark leaves: tried before the measurement, which takes minutes, and written after it."""

import json
import tempfile
from pathlib import Path

from fcmae.benchmark.report import Report
from fcmae.errors import UserError
from fcmae.files import write_text


def check_outputs(*, json: str | None, plot: str | None, what: str) -> None:
    """Refuses what could not be written later.

    Raises:
        UserError: names the option.
    """
    for option, name in (("json", json), ("plot", plot)):
        if name is not None:
            _check_writable(option, Path(name))
    if plot is not None:
        if what != "step":
            raise UserError(f"plot={plot} shows steps, not what={what}: leave it out, or use what=step")
        from fcmae.benchmark.plot import check_format  # says so if matplotlib is missing

        check_format(Path(plot))


def write_outputs(report: Report, *, json: str | None, plot: str | None) -> list[str]:
    """Writes the files that are named, and returns their names."""
    if json is not None:
        write_report(report, Path(json))
    if plot is not None:
        from fcmae.benchmark.plot import draw

        draw(report, Path(plot))
    return [name for name in (json, plot) if name is not None]


def write_report(report: Report, path: Path) -> None:
    """All numbers; a name ending in .jsonl keeps those of earlier runs, one line each.

    Raises:
        UserError: it cannot be written.
    """
    if path.suffix == ".jsonl":
        earlier = path.read_text(encoding="utf-8") if path.exists() else ""
        write_text(path, f"{earlier}{json.dumps(report)}\n")
    else:
        write_text(path, json.dumps(report, indent=2) + "\n")


def _check_writable(option: str, path: Path) -> None:
    try:
        if path.is_dir():
            raise IsADirectoryError
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{option}={path} cannot be written: name a file in a folder where you may write") from error
