"""One run, from a checked configuration to its end: the folder, the lock, the loggers, the fit, the report."""

import logging
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from rich.console import Console

from fcmae.checkpoints.format import check_same_steps, read_checkpoint
from fcmae.data.datamodule import ImageDataModule
from fcmae.stopping import exit_code, watching
from fcmae.training import report
from fcmae.training.agreement import Agreement, RunInterrupted
from fcmae.training.callbacks.broken_images import BrokenImages
from fcmae.training.callbacks.checkpoints import Checkpoints
from fcmae.training.callbacks.finite_loss import FiniteLoss
from fcmae.training.callbacks.progress import ProgressBar
from fcmae.training.callbacks.ranks import Ranks
from fcmae.training.callbacks.throughput import Throughput
from fcmae.training.checkpoint_io import AtomicCheckpointIO
from fcmae.training.console import messages, open_console, quiet
from fcmae.training.geometry import choose_precision, set_accumulation
from fcmae.training.launching import check_launch, leave_signals_to_us, same_everywhere
from fcmae.training.loggers import start_loggers, wandb_run_id
from fcmae.training.micro_batch import largest_micro_batch, share_of
from fcmae.training.module import TrainingModule
from fcmae.training.run_folder import RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a verb brings to its run.

    Attributes:
        module: with a description of the model.
        data: images to train on.
        callbacks: of this verb alone.
        best_by: metrics by which a checkpoint is the best.
        lines: what is about to happen, for the run's log.
    """

    module: TrainingModule
    data: ImageDataModule
    callbacks: Sequence[L.Callback] = ()
    best_by: Sequence[str] = ()
    lines: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all runs have in common, taken from their configuration.

    Attributes:
        config: the whole of it, resolved, as plain data.
        overrides: what was typed.
        next_command: what one would type after the run, told whether its images had 8 bits per channel.
        auto_batch: find out how many images a device takes at once.
        trainer: makes Lightning's trainer from what is added here.
        loggers: makes the loggers, given the folder's Weights & Biases id.
    """

    config: dict[str, Any]
    overrides: list[str]
    next_command: Callable[[bool], str]
    auto_batch: bool
    trainer: Callable[..., L.Trainer]
    loggers: Callable[[str | None], list[Logger]]


def train(setting: Setting, make_parts: Callable[[RunFolder], Parts]) -> None:
    """Runs, or goes on with, what a configuration describes.

    Everything is built and checked before the run's folder is touched, so that a mistake leaves nothing half-written.

    Args:
        setting: of the run.
        make_parts: builds module and data; called once, seeded, unless the run is finished.

    Raises:
        UserError: something that the user can mend.
    """
    with watching() as request:
        _train(setting, make_parts, Agreement(request))


def _train(setting: Setting, make_parts: Callable[[RunFolder], Parts], agreement: Agreement) -> None:
    config = setting.config
    folder, console = RunFolder(Path(config["run_dir"])), open_console()
    start_over = config["resume"] == "never"
    if not start_over:
        folder.check_same(config)
        if folder.is_finished():
            with messages(console, log_file=None):
                report.already_finished(folder, setting.next_command(True))
            return
    checkpoint = None if start_over else folder.newest_checkpoint()
    L.seed_everything(config["seed"], workers=True, verbose=False)
    parts = make_parts(folder)
    parts.data.gate = agreement

    def facts() -> dict[str, str]:
        return same_everywhere(config, parts.module.description["steps"]["data"], checkpoint)

    ranks = Ranks(agreement=agreement, facts=facts, timeout=config["rank_timeout"], journal=folder.journal)
    with quiet():
        trainer = _trainer(setting, parts, folder, console, ranks)
    _join(setting, parts, trainer, checkpoint)

    first = trainer.is_global_zero
    if first and start_over:
        folder.set_aside()
    with (
        folder.lock() if first else nullcontext(),
        messages(console, log_file=folder.log, silent=not first),
    ):
        if first:
            folder.create(config, setting.overrides)
        run_id = wandb_run_id(folder.path) if first and "wandb" in config["logger"] else None
        trainer.loggers = start_loggers(setting.loggers(run_id), folder)
        for line in parts.lines:
            log.info(line)
        report.start(folder, parts.module, parts.data, trainer, checkpoint)
        _fit(setting, folder, parts, trainer, checkpoint, ranks)


def _trainer(setting: Setting, parts: Parts, folder: RunFolder, console: Console, ranks: Ranks) -> L.Trainer:
    throughput, finite_loss = Throughput(), FiniteLoss()
    options, save = setting.config["trainer"], setting.config["save"]
    launch = check_launch(options, os.environ)
    trainer = setting.trainer(
        precision=choose_precision(options["precision"], options["accelerator"]),
        callbacks=[
            ranks,
            throughput,
            finite_loss,
            BrokenImages(file=folder.skipped, images=len(parts.data.source), max_broken=parts.data.max_broken),
            *parts.callbacks,
            ProgressBar(throughput=throughput, console=console),
            Checkpoints(
                folder=folder.checkpoints,
                exported=folder.exported,
                every_n_steps=save["every_n_steps"],
                keep=save["keep"],
                best_by=parts.best_by,
                finite_loss=finite_loss,
                throughput=throughput,
                journal=folder.journal,
            ),
        ],
        plugins=[AtomicCheckpointIO(), launch.environment],
        logger=False,
        default_root_dir=str(folder.path),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    leave_signals_to_us(trainer)
    return trainer


def _join(setting: Setting, parts: Parts, trainer: L.Trainer, checkpoint: Path | None) -> None:
    """Tells module, data and trainer what follows from one another, and where an earlier start stopped."""
    config = setting.config
    module, data = parts.module, parts.data
    if config["channels_last"]:
        module.to(memory_format=torch.channels_last)
    if config["compile"]:
        module.compile_network()
    if setting.auto_batch:
        config["data"]["batch_size"] = data.batch_size = largest_micro_batch(
            module,
            data,
            trainer.strategy.root_device,
            precision=str(trainer.precision),
            share=share_of(trainer, config["effective_batch"]),
        )
    module.effective_batch = set_accumulation(
        trainer, batch_size=data.batch_size, effective_batch=config["effective_batch"]
    )
    data.check_enough(
        module.effective_batch,
        world_size=trainer.num_devices * trainer.num_nodes,
        asked_for=config["effective_batch"] is not None,
    )
    module.optim.groups(module.trained)  # refuses a network that its layer decay is not made for
    module.check_device(trainer.strategy.root_device)
    module.description["steps"] = {"data": data.fingerprint(), "effective_batch": module.effective_batch}
    if checkpoint is not None:
        earlier = read_checkpoint(checkpoint)
        check_same_steps(earlier["fcmae"], module.description, checkpoint)
        data.steps_done = earlier["global_step"]


def _fit(
    setting: Setting, folder: RunFolder, parts: Parts, trainer: L.Trainer, checkpoint: Path | None, ranks: Ranks
) -> None:
    try:
        trainer.fit(parts.module, datamodule=parts.data, ckpt_path=checkpoint, weights_only=True)
        steps = int(trainer.estimated_stepping_batches)
        if trainer.global_step == steps and parts.module.validated_at != steps:
            trainer.validate(parts.module, datamodule=parts.data, verbose=False)  # it was stopped just before that
    except RunInterrupted as error:
        report.stopped(folder, trainer, signal.Signals(error.signum).name)
        with suppress(RuntimeError):  # one of them is gone already; what is saved is saved
            ranks.agreement.wait()  # a launcher may kill all ranks as soon as one of them ends
        raise SystemExit(exit_code(error.signum)) from None
    except Exception as error:
        ranks.on_exception(trainer, parts.module, error)  # if it comes from saving what a signal had stopped
        if ranks.fault is None:
            raise
        raise ranks.fault from error
    finally:
        ranks.close()
    if trainer.global_step < steps:  # by an option such as trainer.max_time
        then = "with a greater trainer.max_time the same command goes on from there"
        report.stopped(folder, trainer, "an option of the trainer", then=then)
        return
    report.end(folder, trainer, setting.next_command(parts.data.normalize.eight_bits))
