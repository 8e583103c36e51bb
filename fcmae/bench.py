"""How fast is a pre-training step, how much memory does it need, does the loader keep up, what does a picture cost?

python -m fcmae.bench +model=tiny batch_size=8 precision=32 device=cpu threads=1 repeats=9 json=out.json
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress

from fcmae.benchmark.conditions import Conditions
from fcmae.benchmark.doctor import Finding, choose_engines
from fcmae.benchmark.outputs import check_outputs, write_outputs
from fcmae.benchmark.pictures import picture_tables, run_pictures
from fcmae.benchmark.report import Report, describe
from fcmae.benchmark.run import describe_patches, run_loader, run_steps, run_training
from fcmae.benchmark.tables import headline, tables
from fcmae.benchmark.variants import check_baselines
from fcmae.command_line import launch
from fcmae.command_line.config_check import check_choice, check_same_input
from fcmae.data.datamodule import ImageDataModule
from fcmae.engines.auto import choose
from fcmae.errors import UserError
from fcmae.models.fcmae import FCMAE
from fcmae.training.out_of_memory import within_memory


def bench(config: DictConfig) -> None:
    """Measures, prints tables, and writes all numbers to `json` and a picture to `plot`, if these name files.

    Raises:
        UserError: a value out of its bounds, a device or an engine that this machine lacks, too little memory, or a
            file that cannot be written.
    """
    console = Console()
    console = console if console.width >= 120 else Console(width=120)  # a log file says 80, and cuts the tables
    conditions = _check(config)
    findings = [] if config.engines is None or config.what in ("loader", "pictures") else _examine(config, conditions)
    for finding in findings:
        if finding.reason is not None:
            console.print(
                f"{finding.name} is left out: {finding.reason}", highlight=False, markup=False, soft_wrap=True
            )

    def run(batch_size: int) -> Report:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            return _run(config, replace(conditions, batch_size=batch_size), findings, progress)

    report = within_memory(run, conditions.batch_size, halve=config.halve, say=console.print)
    console.print(headline(report), highlight=False, markup=False)
    for table in (*tables(report), *picture_tables(report)):
        console.print(table)
    for name in write_outputs(report, json=config.json, plot=config.plot):
        console.print(f"written: {name}", highlight=False, markup=False)


def _run(config: DictConfig, conditions: Conditions, findings: Sequence[Finding], progress: Progress) -> Report:
    bars: dict[str, Any] = {}

    def advance(name: str, total: int) -> None:
        if name not in bars:
            bars[name] = progress.add_task(name, total=total)
        progress.advance(bars[name])

    def build(device: str) -> FCMAE:
        torch.manual_seed(conditions.seed)
        with torch.device(device):
            model: FCMAE = launch.build(config.model)
        return model

    model = _plain(config.model) | describe_patches(build, conditions.image_size)
    if model["engine"] == "auto":
        model["engine"] = f"{choose(torch.device(conditions.device).type)} (auto)"
    report = describe(config.what, conditions, model, findings)
    working = [finding.engine for finding in findings if finding.engine is not None]
    engines = working if findings else None
    if config.what == "step":
        baselines = check_baselines(_plain(config.baselines))
        return report | run_steps(build, conditions, baselines=baselines, engines=engines, progress=advance)
    if config.what == "pictures":
        return report | run_pictures(conditions, advance, quality=config.quality)
    data: ImageDataModule = launch.build(config.data, batch_size=conditions.batch_size)
    if config.what == "loader":
        return report | run_loader(data, conditions, advance)
    return report | run_training(build, data, conditions, engines=engines, progress=advance)


def _check(config: DictConfig) -> Conditions:
    """Everything that can be checked before something is built."""
    check_choice(config, "what", ("step", "loader", "training", "pictures"))
    check_choice(config, "halve", (True, False))
    check_outputs(json=config.json, plot=config.plot, what=config.what)
    check_baselines(_plain(config.baselines))
    if config.what in ("loader", "training"):
        _check_data(config)
    sides = [config.model.image_size] * 2 if isinstance(config.model.image_size, int) else config.model.image_size
    if len(sides) != 2:
        raise UserError(f"model.image_size={sides} must be one side or two, [height, width]")
    names = ("batch_size", "threads", "repeats", "warmup", "clock", "compile", "optimizer", "seed")
    return Conditions(
        image_size=(sides[0], sides[1]),
        precision=str(config.precision),
        device=str(config.device),
        **{name: config[name] for name in names},
    )


def _check_data(config: DictConfig) -> None:
    if config.get("data") is None:
        raise UserError(f"what={config.what} needs images: add data=digits, or data=folder data.path=DIR")
    check_same_input(config)


def _examine(config: DictConfig, conditions: Conditions) -> list[Finding]:
    findings = choose_engines(_plain(config.engines), conditions.device, [torch.float32, conditions.dtype])
    if all(finding.engine is None for finding in findings):
        raise UserError("no engine works here: " + "; ".join(str(finding.reason) for finding in findings))
    return findings


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def main() -> None:
    """`python -m fcmae.bench`"""
    launch.run("bench", bench)


if __name__ == "__main__":
    main()
