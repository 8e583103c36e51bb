"""All that was measured, as plain JSON values. Tables and pictures show what stands here and nothing else."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fcmae.benchmark.conditions import Conditions
from fcmae.benchmark.doctor import Finding
from fcmae.benchmark.loader import LoaderSpeed, TrainingSpeed
from fcmae.benchmark.step import Measurement
from fcmae.benchmark.variants import BASELINES

Report = dict[str, Any]


def describe(what: str, conditions: Conditions, model: Mapping[str, Any], findings: Sequence[Finding]) -> Report:
    """What every report begins with: `what` was measured, on which `machine`, under which `conditions`, on which
    `model`, and under `engines`, by name, what the doctor found (`largest_errors`, `reason` if it was left out)."""
    return {
        "what": what,
        "machine": _machine(conditions),
        "conditions": asdict(conditions),
        "model": dict(model),
        "engines": {
            finding.name: {"largest_errors": dict(finding.largest_errors), "reason": finding.reason}
            for finding in findings
        },
    }


def step_results(
    measurements: Mapping[str, Measurement],
    flop: Mapping[str, int],
    *,
    matmul_peak: float,
    batch_size: int,
) -> Report:
    """The part of a report on steps.

    Args:
        measurements: by name of the variant.
        flop: operations per step, likewise.
        matmul_peak: operations per second of a large matrix product.
        batch_size: images per step.

    Returns:
        `matmul_peak_tflops`, `baselines` (names), and under `variants` by name: `seconds` (every repeat), `median_ms`,
        `quartiles_ms`, `images_per_second`, `saved_bytes`, `peak_bytes` (None where the system does not tell),
        `gflop_per_image`, `tflops`, `of_matmul_peak`, and under `ratios`, by name of the baseline, `time` (of the
        medians), `saved` and `peak`.
    """
    baselines = [name for name in measurements if name in BASELINES]
    variants = {}
    for name, measured in measurements.items():
        median = measured.times.median or 1e-9
        variants[name] = {
            "seconds": list(measured.times.seconds),
            "median_ms": median * 1e3,
            "quartiles_ms": [value * 1e3 for value in measured.times.quartiles],
            "images_per_second": batch_size / median,
            "saved_bytes": measured.saved_bytes,
            "peak_bytes": measured.peak_bytes,
            "gflop_per_image": flop[name] / batch_size / 1e9,
            "tflops": flop[name] / median / 1e12,
            "of_matmul_peak": flop[name] / median / matmul_peak,
            "ratios": {baseline: _ratios(measured, measurements[baseline]) for baseline in baselines},
        }
    return {"matmul_peak_tflops": matmul_peak / 1e12, "baselines": baselines, "variants": variants}


def loader_results(speed: LoaderSpeed) -> Report:
    """The part of a report on the loader: `seconds` of every batch, `workers`, `images_per_second`, and that
    `per_core`, which is per worker."""
    return asdict(speed) | {"images_per_second": speed.images_per_second, "per_core": speed.per_core}


def training_results(speed: TrainingSpeed, loader: LoaderSpeed) -> Report:
    """The part of a report on one variant's training loop.

    Returns:
        `seconds` of every turn, how long each `waited` for data, the share of `waiting`, `images_per_second`, that of
        the step alone, and `loader_per_step`: below 1 the loader is slower than the step, and sets the pace.
    """
    return {
        "seconds": list(speed.seconds),
        "waited": list(speed.waited),
        "waiting": speed.waiting,
        "images_per_second": speed.images_per_second,
        "step_images_per_second": speed.step_images_per_second,
        "loader_per_step": loader.images_per_second / speed.step_images_per_second,
    }


def _ratios(measured: Measurement, base: Measurement) -> dict[str, float | None]:
    return {
        "time": measured.times.median / (base.times.median or 1e-9),
        "saved": measured.saved_bytes / base.saved_bytes,
        "peak": measured.peak_bytes / base.peak_bytes if measured.peak_bytes and base.peak_bytes else None,
    }


def _machine(conditions: Conditions) -> dict[str, str | int]:
    machine: dict[str, str | int] = {
        "device": f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": os.cpu_count() or 1,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if conditions.on_cuda:
        machine["cpu"] = machine["device"]
        machine["device"] = torch.cuda.get_device_name(conditions.device)
        machine["cuda"] = str(torch.version.cuda)
        machine["driver"] = _driver()
    return machine


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return next(iter(done.stdout.split()), "unknown")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
