"""What the verbs that train take from their configuration alike."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from fcmae.checkpoints.weights import read_weights
from fcmae.command_line.launch import build
from fcmae.command_line.run_inference import progress_bar
from fcmae.data.statistics import channel_statistics
from fcmae.errors import UserError
from fcmae.training.run_folder import RunFolder
from fcmae.training.session import Setting


def run_setting(config: DictConfig, *, next_command: Callable[[bool], str]) -> Setting:
    """The folder's, the trainer's and the loggers' part of a training run's configuration.

    Args:
        config: of the run.
        next_command: what one would type after it, see `Setting`.
    """

    def loggers(wandb_id: str | None) -> list[Logger]:
        if "wandb" in config.logger:
            config.logger.wandb.id = config.logger.wandb.id or wandb_id
        return list(build(config.logger).values())

    auto_batch = config.data.batch_size == "auto"
    if auto_batch:
        if config.effective_batch is None:
            raise UserError("data.batch_size=auto keeps effective_batch: say how many images a step sees, such as 1024")
        config.data.batch_size = 2 * config.data.repeats  # until the session knows what the device takes
    settle_normalization(config)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    overrides = list(HydraConfig.get().overrides.task)
    return Setting(
        config=plain,
        overrides=overrides,
        next_command=next_command,
        auto_batch=auto_batch,
        trainer=partial(build, config.trainer),
        loggers=loggers,
    )


def settle_normalization(config: DictConfig) -> None:
    """Decides mean and deviation where they were not typed as numbers.

    A run that goes on keeps its own; one that starts from a checkpoint takes the checkpoint's, or what it has learned
    would not fit; `auto` measures them. All that is made of the configuration afterwards follows from the numbers.
    """
    typed = {override.partition("=")[0].lstrip("+") for override in HydraConfig.get().overrides.task}
    known = _of_the_run(config) or _of_the_checkpoint(config)
    for name in ("mean", "std"):
        fits = len(known.get(name, ())) == config.data.in_chans
        if fits and (config.data[name] == "auto" or f"data.{name}" not in typed):
            config.data[name] = list(known[name])
    names = [name for name in ("mean", "std") if config.data[name] == "auto"]
    measured = _measured(config) if names else {}
    for name in names:
        config.data[name] = measured[name]


def _of_the_run(config: DictConfig) -> dict[str, Any]:
    """The `data` of the run in `run_dir`, if there is one to go on with; a start that saved nothing is none."""
    folder = RunFolder(Path(config.run_dir))
    begun = folder.is_finished() or any(folder.checkpoints.glob("*.ckpt"))
    if config.resume == "never" or not begun or not folder.config.is_file():
        return {}
    earlier: dict[str, Any] = (yaml.safe_load(folder.config.read_text(encoding="utf-8")) or {}).get("data", {})
    return earlier


def _of_the_checkpoint(config: DictConfig) -> dict[str, Any]:
    """How images were prepared for the network that a run starts from, if its file says so."""
    start = config.get("checkpoint") or config.get("init")
    if start is None:
        return {}
    given: dict[str, Any] = (read_weights(start).description or {}).get("input", {})
    return given


def _measured(config: DictConfig) -> dict[str, list[float]]:
    trial = config.copy()
    trial.data.mean = trial.data.std = [0.5] * config.data.in_chans
    with progress_bar() as bar:
        task = bar.add_task("mean and deviation of the images", total=None)
        mean, std = channel_statistics(
            build(trial.data), lambda done, total: bar.update(task, completed=done, total=total)
        )
    return {"mean": mean, "std": std}
