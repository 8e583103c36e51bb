"""What scripts/gpu_check.sh found, against the bars: one page of Markdown.

python -m fcmae.benchmark.summary OUT_DIR tests=0 tiny=124 ...
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fcmae.benchmark.report import Report
from fcmae.files import write_text

# What the first engine's share of a baseline may be at most: (figure, baseline, share); None: shown only.
BARS = (
    ("time", "dense", None),
    ("time", "dense compiled", 0.40),
    ("time", "same kernels", 0.45),
    ("peak", "dense", None),
    ("peak", "dense compiled", 0.40),
)
BARRED = (("tiny", 256), ("base", 128))  # model and batch for which they were set
OUTCOMES = {"0": "ok", "124": "took too long", "137": "took too long", "none": "left out: no time"}
HARMLESS = ("0", "none")


def summarise(folder: Path, outcomes: Mapping[str, str]) -> str:
    """Reads `tests.txt` and `results.jsonl` in a folder, where they are, and returns the page.

    Args:
        folder: the output of scripts/gpu_check.sh.
        outcomes: by step its exit status, or `none` if it was left out.
    """
    reports = [json.loads(line) for line in _lines(folder / "results.jsonl")]
    rows = [row for report in reports for row in _figures(report)]
    bars = [f"{figure} / {baseline}" + (f" (≤ {share:.2f})" if share else "") for figure, baseline, share in BARS]
    return "\n\n".join(
        [
            "# GPU check",
            _machine(reports[0]) if reports else "Nothing was measured.",
            _table(["step", "outcome"], [[name, _outcome(code)] for name, code in outcomes.items()]),
            "Tests: " + next(reversed(_lines(folder / "tests.txt")), "none"),
            _table(["model", "batch", "variant", "ms/step", "of matmul peak", *bars], rows),
        ]
    )


def _figures(report: Report) -> list[list[str]]:
    """A row of cells for each of our variants; those for which a bar was set say whether it was met."""
    model, conditions = report["model"]["size"], report["conditions"]
    ours = [name for name in report["variants"] if name not in report["baselines"]]
    rows = []
    for name in ours:
        row = report["variants"][name]
        barred = name == ours[0] and (model, conditions["batch_size"]) in BARRED
        shares = [_share(row["ratios"].get(base, {}).get(figure), bar, barred) for figure, base, bar in BARS]
        kind = f"{name}, {conditions['precision']}{', compiled' if conditions['compile'] else ''}"
        size = f"{row['median_ms']:.1f}", f"{row['of_matmul_peak']:.1%}"
        rows.append([model, str(conditions["batch_size"]), kind, *size, *shares])
    return rows


def _share(value: float | None, bar: float | None, barred: bool) -> str:
    if value is None:
        return "not measured" if barred and bar else ""
    return f"{value:.3f}" + ((" met" if value <= bar else " **missed**") if barred and bar else "")


def _machine(report: Report) -> str:
    return ", ".join(f"{name} {value}" for name, value in report["machine"].items())


def _outcome(code: str) -> str:
    return OUTCOMES.get(code, f"failed with status {code}")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines: list[Sequence[Any]] = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line] if file.exists() else []


def main(arguments: Sequence[str]) -> int:
    """Writes summary.md; the exit status says whether all steps went well."""
    folder, outcomes = Path(arguments[0]), dict(argument.split("=", 1) for argument in arguments[1:])
    write_text(folder / "summary.md", summarise(folder, outcomes) + "\n")
    return int(any(code not in HARMLESS for code in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
