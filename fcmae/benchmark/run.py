"""The kinds of measurement, each from the parts that it needs to a piece of the report."""

from collections.abc import Callable, Sequence
from contextlib import closing

import torch

from fcmae.benchmark.arithmetic import flop_per_step, matmul_peak
from fcmae.benchmark.conditions import Conditions, environment
from fcmae.benchmark.loader import Batches, measure_loader, measure_training_loop
from fcmae.benchmark.report import Report, loader_results, step_results, training_results
from fcmae.benchmark.step import measure_training
from fcmae.benchmark.variants import build_variants
from fcmae.data.datamodule import ImageDataModule
from fcmae.engines import Engine
from fcmae.models.fcmae import FCMAE

Build = Callable[[str], FCMAE]
"""Builds the model, freshly initialised, on a device."""
Progress = Callable[[str, int], object]
"""Told that something of this name is done, and how often it will be in all."""


def describe_patches(build: Build, image_size: tuple[int, int]) -> dict[str, int]:
    """How many patches an image has, and how many of them are visible."""
    model = build("meta")
    mask = model.masking(torch.empty(1, model.encoder.in_chans, *image_size, device="meta"))
    return {"patches": mask.patches, "visible_patches": mask.visible_patches}


def run_steps(
    build: Build,
    conditions: Conditions,
    *,
    baselines: Sequence[str],
    engines: Sequence[Engine] | None,
    progress: Progress,
) -> Report:
    """Training steps of our model and of the baselines, side by side. For engines see `build_variants`."""
    blueprint = build("meta")
    images = torch.empty(conditions.batch_size, blueprint.encoder.in_chans, *conditions.image_size, device="meta")
    counted = build_variants(blueprint, baselines=baselines, engines=engines)
    flop = {name: flop_per_step(variant, images) for name, variant in counted.items()}

    rounds = conditions.warmup + conditions.repeats
    measured = measure_training(  # which alone holds the networks: their memory is free again afterwards
        build_variants(build(conditions.device), baselines=baselines, engines=engines),
        conditions,
        lambda name: progress(name, rounds),
    )
    with environment(conditions):
        peak = matmul_peak(conditions)
    return step_results(measured, flop, matmul_peak=peak, batch_size=conditions.batch_size)


def run_loader(data: ImageDataModule, conditions: Conditions, progress: Progress) -> Report:
    """The training loader alone."""
    with closing(Batches(data)) as batches:
        return {"loader": loader_results(measure_loader(batches, conditions, progress))}


def run_training(
    build: Build,
    data: ImageDataModule,
    conditions: Conditions,
    *,
    engines: Sequence[Engine] | None,
    progress: Progress,
) -> Report:
    """The training loader alone; then, for each engine, steps alone and both together."""
    variants = build_variants(build(conditions.device), baselines=(), engines=engines)
    with closing(Batches(data)) as batches:
        loader = measure_loader(batches, conditions, progress)
        training = {}
        for name, variant in variants.items():
            speed = measure_training_loop(variant, data, batches, conditions, progress)
            training[name] = training_results(speed, loader)
    return {"loader": loader_results(loader), "training": training}
