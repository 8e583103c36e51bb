"""`python -m fcmae.pretrain +model=tiny`: masked-autoencoder pre-training."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from fcmae.checkpoints.format import check_same_steps, describe, read_checkpoint
from fcmae.config_check import check_choice, check_whole
from fcmae.data.datamodule import ImageDataModule
from fcmae.errors import UserError
from fcmae.launch import build, run
from fcmae.models.block import compiled_block
from fcmae.training import report
from fcmae.training.callbacks.broken_images import BrokenImages
from fcmae.training.callbacks.checkpoints import Checkpoints, RunInterrupted
from fcmae.training.callbacks.finite_loss import FiniteLoss
from fcmae.training.callbacks.progress import ProgressBar
from fcmae.training.callbacks.reconstructions import Reconstructions
from fcmae.training.callbacks.throughput import Throughput
from fcmae.training.checkpoint_io import AtomicCheckpointIO
from fcmae.training.console import messages, open_console
from fcmae.training.geometry import choose_precision, cluster_environment, set_accumulation
from fcmae.training.loggers import start_loggers, wandb_run_id
from fcmae.training.module import PretrainModule
from fcmae.training.run_folder import RunFolder


def pretrain(config: DictConfig) -> None:
    """Runs, or goes on with, the pre-training that a configuration describes.

    Everything is built and checked before the run's folder is touched, so that a mistake leaves nothing half-written.

    Args:
        config: as composed from `configs/pretrain.yaml`.

    Raises:
        UserError: something that the user can mend.
    """
    _check(config)
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    folder, console = RunFolder(Path(config.run_dir)), open_console()
    start_over = config.resume == "never"
    if not start_over:
        folder.check_same(plain)
        if folder.is_finished():
            with messages(console, log_file=None):
                report.already_finished(folder)
            return
    checkpoint = None if start_over else folder.newest_checkpoint()
    module, data, trainer = _build(config, plain, folder, console, checkpoint)

    first = trainer.is_global_zero
    if first and start_over:
        folder.set_aside()
    with (
        folder.lock() if first else nullcontext(),
        messages(console, log_file=folder.log, silent=not first),
    ):
        if first:
            folder.create(plain, list(HydraConfig.get().overrides.task))
        if "wandb" in config.logger:
            config.logger.wandb.id = config.logger.wandb.id or wandb_run_id(folder.path)
        trainer.loggers = start_loggers(list(build(config.logger).values()), folder)
        report.start(folder, module, data, trainer, checkpoint)
        _fit(folder, module, data, trainer, checkpoint)


def _build(
    config: DictConfig, plain: dict[str, Any], folder: RunFolder, console: Console, checkpoint: Path | None
) -> tuple[PretrainModule, ImageDataModule, L.Trainer]:
    L.seed_everything(config.seed, workers=True, verbose=False)
    data: ImageDataModule = build(config.data)
    data.split()  # finds the images, or says that there are none
    description = describe(plain)
    module = PretrainModule(
        model=build(config.model), optim=build(config.optim), seed=config.seed, description=description
    )
    trainer = _trainer(config, folder, data, console)
    module.model.encoder.engine.check_device(trainer.strategy.root_device)
    module.effective_batch = set_accumulation(
        trainer, batch_size=data.batch_size, effective_batch=config.effective_batch
    )
    data.check_enough(
        module.effective_batch,
        world_size=trainer.num_devices * trainer.num_nodes,
        asked_for=config.effective_batch is not None,
    )
    description["steps"] = {"data": data.fingerprint(), "effective_batch": module.effective_batch}
    if checkpoint is not None:
        earlier = read_checkpoint(checkpoint)
        check_same_steps(earlier["fcmae"], description, checkpoint)
        data.steps_done = earlier["global_step"]
    if config.channels_last:
        module = module.to(memory_format=torch.channels_last)
    if config.compile:
        module.model.encoder.run_block = module.model.decoder.run_block = compiled_block()
    return module, data, trainer


def _fit(
    folder: RunFolder, module: PretrainModule, data: ImageDataModule, trainer: L.Trainer, checkpoint: Path | None
) -> None:
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except RunInterrupted as error:
        report.stopped(trainer.global_step)
        raise SystemExit(128 + error.signum) from None
    if trainer.global_step < int(trainer.estimated_stepping_batches):  # by an option such as trainer.max_time
        report.stopped(trainer.global_step)
        return
    if "val_loss" not in trainer.callback_metrics:  # stopped earlier, between the last step and its validation
        trainer.validate(module, datamodule=data, verbose=False)
    report.end(folder, trainer)


def _trainer(config: DictConfig, folder: RunFolder, data: ImageDataModule, console: Console) -> L.Trainer:
    throughput, finite_loss = Throughput(), FiniteLoss()
    callbacks = [
        throughput,
        finite_loss,
        BrokenImages(file=folder.skipped, images=len(data.source), max_broken=data.max_broken),
        ProgressBar(throughput=throughput, console=console),
        Reconstructions(folder=folder.images, pictures=config.pictures),
        Checkpoints(
            folder=folder.checkpoints,
            exported=folder.exported,
            every_n_steps=config.checkpoint.every_n_steps,
            keep=config.checkpoint.keep,
            finite_loss=finite_loss,
            throughput=throughput,
        ),
    ]
    trainer: L.Trainer = build(
        config.trainer,
        precision=choose_precision(config.trainer.precision, config.trainer.accelerator),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(), *cluster_environment()],
        logger=False,
        default_root_dir=str(folder.path),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    return trainer


def _check(config: DictConfig) -> None:
    for name in ("epochs", "trainer.max_epochs", "checkpoint.every_n_steps", "checkpoint.keep"):
        check_whole(config, name, least=1)
    check_whole(config, "pictures", least=0)
    check_whole(config, "seed", least=0, most=2**32 - 1)
    if config.trainer.limit_train_batches is not None:
        check_whole(config, "trainer.limit_train_batches", least=1)
    if not str(config.run_name or "").strip("./"):
        raise UserError(f"run_name={config.run_name!r} names no folder: give it a name, or leave it out")
    for name in ("image_size", "in_chans"):
        if config.model[name] != config.data[name]:
            raise UserError(
                f"model.{name}={config.model[name]} differs from data.{name}={config.data[name]}: "
                f"set data.{name}, which the model follows"
            )
    if config.effective_batch is not None:
        check_whole(config, "effective_batch", least=1)
    check_choice(config, "resume", ("auto", "never"))
    check_choice(config, "channels_last", (True, False))
    check_choice(config, "compile", (True, False))


if __name__ == "__main__":
    run("pretrain", pretrain)
