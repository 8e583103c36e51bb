"""A report on steps as a picture: time and memory of every variant, side by side."""

from io import BytesIO
from pathlib import Path
from typing import Any

from fcmae.benchmark.report import Report
from fcmae.errors import UserError
from fcmae.files import atomic_writer

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise UserError(f"plot=... needs matplotlib: pip install 'fcmae[bench]' ({error})") from error

OF_BASELINES, OURS = "#a0aec0", "#3182ce"
INK, GRID = "#1a202c", "#e2e8f0"


def check_format(path: Path) -> None:
    """Refuses a name whose ending is no format of pictures.

    Raises:
        UserError: says so.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"plot={path} is no picture: use a name ending in .png, .svg or .pdf")


def draw(report: Report, path: Path) -> None:
    """Writes the picture to `path`; its ending says in which format.

    Raises:
        UserError: it cannot be written.
    """
    rows = len(report["variants"])
    figure = Figure(figsize=(12, 1.9 + 0.68 * rows), dpi=150, layout="constrained")
    figure.suptitle(_title(report), fontsize=11)
    times, memory = figure.subplots(1, 2, sharey=True)
    _draw_times(times, report)
    _draw_memory(memory, report)
    times.invert_yaxis()  # as in the tables, the baselines on top
    file = BytesIO()
    figure.savefig(file, format=path.suffix.removeprefix("."))
    with atomic_writer(path) as target:
        target.write(file.getvalue())


def _title(report: Report) -> str:
    machine, conditions, model = report["machine"], report["conditions"], report["model"]
    height, width = conditions["image_size"]
    compiled = ", ours compiled" if conditions["compile"] else ""
    threads = "" if "cuda" in machine else f", {conditions['threads']} thread(s)"
    cuda = f", CUDA {machine['cuda']}, driver {machine['driver']}" if "cuda" in machine else ""
    return (
        f"{model['size']}, {height}x{width} px, {model['visible_patches']} of {model['patches']} patches visible, "
        f"batch {conditions['batch_size']}, precision {conditions['precision']}{compiled}\n"
        f"{machine['device']}{threads}, torch {machine['torch']}{cuda}"
    )


def _draw_times(axes: Axes, report: Report) -> None:
    optimizer = ", optimiser" if report["conditions"]["optimizer"] else ""
    _prepare(axes, f"time of a step: forward, backward{optimizer}", "ms; median and quartiles")
    for name, row in report["variants"].items():
        median, (low, high) = row["median_ms"], row["quartiles_ms"]
        axes.barh(name, median, height=0.6, color=_colour(report, name))
        axes.errorbar(median, name, xerr=[[median - low], [high - median]], color=INK, capsize=3, linewidth=1)
        _label(axes, report, name, high, f"{median:.4g} ms", "time")
    axes.set_xlim(0, 1.4 * max(row["quartiles_ms"][1] for row in report["variants"].values()))


def _draw_memory(axes: Axes, report: Report) -> None:
    rows: dict[str, Any] = report["variants"]
    kind = "peak" if all(row["peak_bytes"] is not None for row in rows.values()) else "saved"
    sizes = {name: row[f"{kind}_bytes"] for name, row in rows.items()}
    unit, divisor = ("GB", 1e9) if max(sizes.values()) >= 1e10 else ("MB", 1e6)
    content = (
        "with weights and gradients; dark: of it, activations saved" if kind == "peak" else "kept for the backward pass"
    )
    _prepare(axes, "peak memory of a step" if kind == "peak" else "saved activations", f"{unit}; {content}")
    for name, row in rows.items():
        axes.barh(name, sizes[name] / divisor, height=0.6, color=_colour(report, name))
        if kind == "peak":
            axes.barh(name, row["saved_bytes"] / divisor, height=0.14, color=INK)
        _label(axes, report, name, sizes[name] / divisor, f"{sizes[name] / divisor:.4g} {unit}", kind)
    axes.set_xlim(0, 1.4 * max(sizes.values()) / divisor)


def _prepare(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)


def _label(axes: Axes, report: Report, name: str, end: float, value: str, kind: str) -> None:
    """The value behind a bar, and what share of each baseline it is, if it is not a baseline itself."""
    shares = {} if name in report["baselines"] else report["variants"][name]["ratios"]
    lines = [value, *(f"{ratios[kind]:.2f} of {baseline}" for baseline, ratios in shares.items())]
    axes.annotate(
        "\n".join(lines),
        (end, name),
        (6, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=INK,
        linespacing=1.15,
    )


def _colour(report: Report, name: str) -> str:
    return OF_BASELINES if name in report["baselines"] else OURS
