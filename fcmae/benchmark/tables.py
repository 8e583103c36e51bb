"""A report for people: a few small tables."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table

from fcmae.benchmark.report import Report


def headline(report: Report) -> str:
    """Machine, conditions and model in a few lines."""
    machine, conditions, model = report["machine"], report["conditions"], report["model"]
    height, width = conditions["image_size"]
    cuda = f", CUDA {machine['cuda']}, driver {machine['driver']}" if "cuda" in machine else ""
    compiled = ", ours compiled" if conditions["compile"] else ""
    first = next((name for name, engine in report["engines"].items() if engine["reason"] is None), model["engine"])
    engine = f"same kernels on engine {first}" if "same kernels" in report.get("variants", {}) else f"engine {first}"
    lines = [
        f"{machine['device']}, {conditions['threads']} thread(s), torch {machine['torch']}{cuda}",
        f"{model['size']}, precision {conditions['precision']}{compiled}, batch {conditions['batch_size']}, "
        f"{height}x{width} px, {model['visible_patches']} of {model['patches']} patches visible, {engine}",
    ]
    if "variants" in report:
        clock = {"process": "CPU time of the process", "wall": "wall time", "cuda": "CUDA events"}[conditions["clock"]]
        optimizer = ", optimiser" if conditions["optimizer"] else ""
        peak = f"matmul peak {report['matmul_peak_tflops']:.3g} TFLOP/s"
        lines.append(f"step: forward, backward{optimizer}; {conditions['repeats']} repeats, clock: {clock}; {peak}")
    return "\n".join(lines)


def tables(report: Report) -> Iterator[Table]:
    """What the report holds. Every ratio's heading names its baseline."""
    if report["engines"]:
        yield _doctor(report)
    if "variants" in report:
        yield _times(report)
        yield _memory(report, "saved", "saved activations")
        if any(row["peak_bytes"] is not None for row in report["variants"].values()):
            yield _memory(report, "peak", "peak memory")
        yield _arithmetic(report)
    if "loader" in report:
        yield _loader(report["loader"])
    if "training" in report:
        yield _training(report["training"])


def _doctor(report: Report) -> Table:
    types = list(dict.fromkeys(name for engine in report["engines"].values() for name in engine["largest_errors"]))
    result = _table(["engine", *(f"largest error, {name}" for name in types), "verdict"])
    for name, engine in report["engines"].items():
        errors = [f"{engine['largest_errors'][kind]:.1e}" if kind in engine["largest_errors"] else "" for kind in types]
        result.add_row(name, *errors, "ok" if engine["reason"] is None else "left out")
    return result


def _times(report: Report) -> Table:
    """The spread is the distance between the quartiles as a share of the median."""
    result = _table(["time", "ms/step", "spread", *_versus(report), "images/s"])
    for name, row in report["variants"].items():
        low, high = row["quartiles_ms"]
        spread = f"{(high - low) / row['median_ms']:.1%}"
        result.add_row(
            name, f"{row['median_ms']:.1f}", spread, *_ratios(row, "time"), f"{row['images_per_second']:.2f}"
        )
    return result


def _memory(report: Report, kind: str, title: str) -> Table:
    result = _table([title, "MB", *_versus(report)])
    for name, row in report["variants"].items():
        size = row[f"{kind}_bytes"]
        result.add_row(name, "" if size is None else f"{size / 1e6:.1f}", *_ratios(row, kind))
    return result


def _arithmetic(report: Report) -> Table:
    result = _table(["arithmetic", "GFLOP/image", "TFLOP/s", "of matmul peak"])
    for name, row in report["variants"].items():
        result.add_row(name, f"{row['gflop_per_image']:.3g}", f"{row['tflops']:.3g}", f"{row['of_matmul_peak']:.1%}")
    return result


def _loader(loader: dict[str, Any]) -> Table:
    result = _table(["loader alone", "images/s", "workers", "images/s per core"])
    rates = f"{loader['images_per_second']:.1f}", str(loader["workers"]), f"{loader['per_core']:.1f}"
    result.add_row(f"batches of {loader['batch_size']}", *rates)
    return result


def _training(training: dict[str, Any]) -> Table:
    result = _table(["training", "images/s", "waiting for data", "step alone, images/s", "loader / step"])
    for name, row in training.items():
        rates = f"{row['step_images_per_second']:.1f}", f"{row['loader_per_step']:.2f}"
        result.add_row(name, f"{row['images_per_second']:.1f}", f"{row['waiting']:.1%}", *rates)
    return result


def _table(columns: Sequence[str]) -> Table:
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for number, column in enumerate(columns):
        result.add_column(column, justify="right" if number else "left", no_wrap=True)
    return result


def _versus(report: Report) -> list[str]:
    return [f"/ {baseline}" for baseline in report["baselines"]]


def _ratios(row: dict[str, Any], kind: str) -> list[str]:
    return ["" if ratios[kind] is None else f"{ratios[kind]:.3f}" for ratios in row["ratios"].values()]
