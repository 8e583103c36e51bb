"""What the devices decide: precision, accumulation, and so the effective batch."""

import lightning as L
import torch

from fcmae.errors import UserError

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")


def choose_precision(setting: str | int, accelerator: str) -> str:
    """`auto` is bf16-mixed on a CUDA device that computes it natively, else float32.

    (CPUs stay with float32: the backward pass of their bf16 convolutions is slower. Statistics of GRN and layer norms,
    target and loss are in float32 whatever the precision.)

    Raises:
        UserError: an unknown precision.
    """
    setting = {"32": "32-true"}.get(str(setting), str(setting))
    if setting not in PRECISIONS:
        raise UserError(f"trainer.precision={setting!r} is unknown: use one of {', '.join(PRECISIONS)}")
    if setting != "auto":
        return setting
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def set_accumulation(trainer: L.Trainer, *, batch_size: int, effective_batch: int | None) -> int:
    """Sets gradient accumulation so that an optimiser step sees `effective_batch` images, if one is asked for.

    Args:
        trainer: knows devices and nodes; its accumulation is changed.
        batch_size: images per device and micro-batch.
        effective_batch: images per optimiser step, or None for what the trainer's own accumulation gives.

    Returns:
        The effective batch.

    Raises:
        UserError: it is no multiple of what the devices take at once.
    """
    at_once = batch_size * trainer.num_devices * trainer.num_nodes
    if effective_batch is not None:
        if effective_batch % at_once:
            raise UserError(
                f"effective_batch={effective_batch} is not a multiple of {at_once} = data.batch_size={batch_size} x "
                f"{trainer.num_devices} devices x {trainer.num_nodes} nodes: change one of them"
            )
        trainer.accumulate_grad_batches = effective_batch // at_once
    accumulate, limit = trainer.accumulate_grad_batches, trainer.limit_train_batches
    if isinstance(limit, int) and limit < accumulate:
        raise UserError(
            f"trainer.limit_train_batches={limit} ends the epoch before the first step, which accumulates {accumulate} "
            "batches: allow at least so many, or make effective_batch smaller"
        )
    return at_once * trainer.accumulate_grad_batches
