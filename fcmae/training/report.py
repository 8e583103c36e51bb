"""What a run tells at its start and its end."""

import json
import logging
from pathlib import Path

import lightning as L

from fcmae.checkpoints.format import passed_over
from fcmae.data.datamodule import ImageDataModule
from fcmae.data.digits import DigitsDataModule
from fcmae.files import write_text
from fcmae.training.json_lines import finite
from fcmae.training.module import TrainingModule
from fcmae.training.run_folder import RunFolder

log = logging.getLogger(__name__)


def start(
    folder: RunFolder, module: TrainingModule, data: ImageDataModule, trainer: L.Trainer, checkpoint: Path | None
) -> None:
    """Says what is about to happen, with the numbers that follow from the machine."""
    optim = module.optim
    train, held_out = data.split()
    height, width = data.size
    if isinstance(data, DigitsDataModule):
        log.info("This is demonstration data. %s", module.instead_of_demonstration)
    for line in module.report():
        log.info(line)
    log.info("data: %d images to train on, %d held out, %dx%d px", len(train), len(held_out), height, width)
    log.info(
        "batch: %d images per step = %d per device x %d devices x %d nodes x %d accumulated",
        module.effective_batch,
        data.batch_size,
        trainer.num_devices,
        trainer.num_nodes,
        trainer.accumulate_grad_batches,
    )
    limit = trainer.limit_train_batches  # a share, unless somebody gave a number
    ended = f"; trainer.limit_train_batches={limit} ends it earlier" if isinstance(limit, int) else ""
    log.info("epoch: %s%s", data.epoch_line(module.effective_batch), ended)
    log.info(
        "learning rate: %.3g = %.3g x %d / 256, warm-up over %g epochs, then a cosine to %g",
        optim.peak_lr(module.effective_batch),
        optim.base_lr,
        module.effective_batch,
        optim.warmup_epochs,
        optim.min_lr,
    )
    log.info("device: %s, precision %s", trainer.accelerator.__class__.__name__, trainer.precision)
    log.info("run folder: %s", folder.path)
    if checkpoint is not None:
        for damaged in passed_over(checkpoint):
            log.warning("%s cannot be read, as after a kill or on a full disk: it is passed over", damaged)
        log.info("going on from %s", checkpoint)


def end(folder: RunFolder, trainer: L.Trainer, next_command: str) -> None:
    """Notes that the run is finished, and says where everything is and what to type next."""
    if not trainer.is_global_zero:
        return
    metrics = {
        name: round(float(value), 6) for name, value in trainer.callback_metrics.items() if name.startswith("val_")
    }
    write_text(folder.summary, json.dumps({"steps": trainer.global_step, **finite(metrics)}, indent=2) + "\n")
    folder.journal.finished(step=trainer.global_step)
    log.info("finished after %d steps", trainer.global_step)
    _say_where(folder, next_command)


def already_finished(folder: RunFolder, next_command: str) -> None:
    """For a command that is typed again after its run has ended."""
    summary = json.loads(folder.summary.read_text(encoding="utf-8"))
    log.info("this run is finished: %s", ", ".join(f"{name} {value}" for name, value in summary.items()))
    log.info("for another one give another run_name, or resume=never to start over")
    _say_where(folder, next_command)


def stopped(
    folder: RunFolder, trainer: L.Trainer, by: str, *, then: str = "the same command goes on from there"
) -> None:
    """For a run that ends before its last step."""
    if trainer.is_global_zero:
        folder.journal.stopped(step=trainer.global_step, signal=by)
    log.info("interrupted after %d steps (%s), which are saved; %s", trainer.global_step, by, then)


def _say_where(folder: RunFolder, next_command: str) -> None:
    for what, file in (
        ("pictures:   %s", folder.images / "latest.png"),
        ("checkpoint: %s", folder.checkpoints / "last.ckpt"),
        ("best:       %s", folder.checkpoints / "best.ckpt"),
        ("encoder:    %s (timm's names)", folder.exported / "encoder.safetensors"),
        ("model:      %s (timm's names)", folder.exported / "model.safetensors"),
    ):
        if file.exists():
            log.info(what, file)
    log.info("next: %s", next_command)
