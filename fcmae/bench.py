"""How fast is a pre-training step, and how much memory does it keep? Compared with the masked dense network.

python -m fcmae.bench +model=tiny batch_size=8 precision=32 device=cpu threads=1 repeats=9 json=out.json
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress

from fcmae import launch
from fcmae.benchmark.report import build_report, headline, table
from fcmae.benchmark.step import Conditions, build_variants, measure_training
from fcmae.errors import UserError
from fcmae.files import write_text
from fcmae.models.fcmae import FCMAE


def bench(config: DictConfig) -> None:
    """Measures, prints a table and, if `json` names a file, writes all numbers there.

    Raises:
        UserError: a value out of its bounds, a device that this machine lacks, or a file that cannot be written.
    """
    path = None if config.json is None else _writable(Path(config.json))
    conditions = Conditions(
        batch_size=config.batch_size,
        image_size=_height_and_width(config.model.image_size),
        precision=str(config.precision),
        device=str(config.device),
        threads=config.threads,
        repeats=config.repeats,
        warmup=config.warmup,
        clock=config.clock,
        compile=config.compile,
        seed=config.seed,
    )
    torch.manual_seed(conditions.seed)
    model = launch.build(config.model)
    visible = _visible_patches(model, conditions.image_size)
    variants = build_variants(model)

    with Progress(console=Console(stderr=True), transient=True) as progress:
        rounds = conditions.warmup + conditions.repeats
        bars = {name: progress.add_task(name, total=rounds) for name in variants}
        measurements = measure_training(variants, conditions, lambda name: progress.advance(bars[name]))

    report = build_report(measurements, conditions, _describe(config.model) | visible)
    console = Console()
    console = console if console.width >= 100 else Console(width=100)  # a log file says 80, and cuts the table
    console.print(headline(report), highlight=False)
    console.print(table(report))
    if path is not None:
        write_text(path, json.dumps(report, indent=2) + "\n")
        console.print(f"all numbers: {path}", highlight=False)


def _describe(model: DictConfig) -> dict[str, Any]:
    arguments = OmegaConf.to_container(model, resolve=True)
    assert isinstance(arguments, dict)
    return {str(name): value for name, value in arguments.items()}


def _visible_patches(model: FCMAE, image_size: tuple[int, int]) -> dict[str, int]:
    mask = model.masking(torch.zeros(1, model.encoder.in_chans, *image_size))
    return {"patches": mask.visible[0].numel(), "visible_patches": mask.index.shape[1]}


def _height_and_width(image_size: int | list[int]) -> tuple[int, int]:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height, width


def _writable(path: Path) -> Path:
    # Tried before the measurement, which takes minutes.
    try:
        if path.is_dir():
            raise IsADirectoryError
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"json={path} cannot be written: name a file in a folder where you may write") from error
    return path


def main() -> None:
    """`python -m fcmae.bench`"""
    launch.run("bench", bench)


if __name__ == "__main__":
    main()
