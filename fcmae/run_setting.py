"""What the verbs that train take from their configuration alike."""

from functools import partial
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from fcmae.data.statistics import channel_statistics
from fcmae.launch import build
from fcmae.run_inference import progress_bar
from fcmae.training.session import Setting


def run_setting(config: DictConfig, *, next_command: str) -> Setting:
    """The folder's, the trainer's and the loggers' part of a training run's configuration.

    Args:
        config: of the run.
        next_command: what one would type after it.
    """

    def loggers(wandb_id: str | None) -> list[Logger]:
        if "wandb" in config.logger:
            config.logger.wandb.id = config.logger.wandb.id or wandb_id
        return list(build(config.logger).values())

    _fill_in_statistics(config)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    overrides = list(HydraConfig.get().overrides.task)
    return Setting(
        config=plain,
        overrides=overrides,
        next_command=next_command,
        trainer=partial(build, config.trainer),
        loggers=loggers,
    )


def _fill_in_statistics(config: DictConfig) -> None:
    """Measures what `data.mean=auto` or `data.std=auto` leaves open; everything else then follows from the numbers."""
    names = [name for name in ("mean", "std") if config.data[name] == "auto"]
    if not names:
        return
    trial = config.copy()
    for name in names:
        trial.data[name] = [0.5] * config.data.in_chans
    with progress_bar() as bar:
        task = bar.add_task("mean and deviation of the images", total=None, visible=False)  # unless it is measured

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        mean, std = channel_statistics(build(trial.data), advance)
    for name, values in (("mean", mean), ("std", std)):
        if name in names:
            config.data[name] = values
