"""What the verbs that train take from their configuration alike."""

from functools import partial
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from fcmae.launch import build
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

    plain: Any = OmegaConf.to_container(config, resolve=True)
    overrides = list(HydraConfig.get().overrides.task)
    return Setting(
        config=plain,
        overrides=overrides,
        next_command=next_command,
        trainer=partial(build, config.trainer),
        loggers=loggers,
    )
