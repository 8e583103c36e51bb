"""How measurements are shown: as a table for people, as JSON for programs. Both say the same."""

import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from fcmae.benchmark.step import BASELINE, Conditions, Measurement

Report = dict[str, Any]


def build_report(measurements: Mapping[str, Measurement], conditions: Conditions, model: Mapping[str, Any]) -> Report:
    """All that was measured and under which conditions, as plain JSON values.

    Args:
        measurements: by name of the variant; the baseline is among them.
        conditions: how it was measured.
        model: what the model is: its arguments in the configuration, `patches` and `visible_patches` per image.

    Returns:
        `machine`, `conditions`, `model`, `baseline`, and under `variants` by name: `seconds` (every repeat),
        `median_ms`, `quartiles_ms`, `ratio` (of the medians, to the baseline), `images_per_second`, `saved_bytes`,
        `saved_ratio`, `peak_bytes` and `peak_ratio` (None where the system does not tell).
    """
    base = measurements[BASELINE]
    return {
        "machine": _machine(conditions),
        "conditions": asdict(conditions),
        "model": dict(model),
        "baseline": BASELINE,
        "variants": {
            name: {
                "seconds": list(measured.times.seconds),
                "median_ms": measured.times.median * 1e3,
                "quartiles_ms": [value * 1e3 for value in measured.times.quartiles],
                "ratio": measured.times.median / base.times.median,
                "images_per_second": conditions.batch_size / measured.times.median,
                "saved_bytes": measured.saved_bytes,
                "saved_ratio": measured.saved_bytes / base.saved_bytes,
                "peak_bytes": measured.peak_bytes,
                "peak_ratio": _ratio(measured.peak_bytes, base.peak_bytes),
            }
            for name, measured in measurements.items()
        },
    }


def headline(report: Report) -> str:
    """Machine, conditions and model in a few lines."""
    machine, conditions, model = report["machine"], report["conditions"], report["model"]
    height, width = conditions["image_size"]
    clock = {"process": "CPU time of the process", "wall": "wall time", "cuda": "CUDA events"}[conditions["clock"]]
    return (
        f"{machine['device']}, {conditions['threads']} thread(s), torch {machine['torch']}, "
        f"precision {conditions['precision']}{', compiled' if conditions['compile'] else ''}\n"
        f"{model['size']}, engine {model['engine']}, batch {conditions['batch_size']}, {height}x{width} px, "
        f"{model['visible_patches']} of {model['patches']} patches visible\n"
        f"step: forward, backward, optimiser; {conditions['repeats']} repeats, clock: {clock}"
    )


def table(report: Report) -> Table:
    """One row per variant. The heading of every ratio names the baseline; the spread is the distance between the
    quartiles as a share of the median."""
    baseline, variants = report["baseline"], report["variants"]
    with_peak = any(row["peak_bytes"] is not None for row in variants.values())
    columns = ["variant", "ms/step", "spread", f"/ {baseline}", "images/s", "saved MB", f"/ {baseline}"]
    columns += ["peak MB", f"/ {baseline}"] if with_peak else []
    result = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        result.add_column(column, justify="right" if number else "left", no_wrap=True)
    for name, row in variants.items():
        low, high = row["quartiles_ms"]
        cells = [name, f"{row['median_ms']:.1f}", f"{(high - low) / row['median_ms']:.1%}", f"{row['ratio']:.3f}"]
        cells += [f"{row['images_per_second']:.2f}", f"{row['saved_bytes'] / 1e6:.1f}", f"{row['saved_ratio']:.3f}"]
        cells += [f"{row['peak_bytes'] / 1e6:.1f}", f"{row['peak_ratio']:.3f}"] if with_peak else []
        result.add_row(*cells)
    return result


def _ratio(value: int | None, baseline: int | None) -> float | None:
    return value / baseline if value and baseline else None


def _machine(conditions: Conditions) -> dict[str, str]:
    if conditions.on_cuda:
        device = torch.cuda.get_device_name(conditions.device)
    else:
        device = f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"
    return {"device": device, "torch": torch.__version__, "python": platform.python_version()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
