"""How many images a device takes at once: tried, so that an effective batch need not be taken apart by hand."""

import gc
import logging
from collections.abc import Callable

import lightning as L
import torch
from torch import nn

from fcmae.data.datamodule import ImageDataModule
from fcmae.errors import UserError
from fcmae.training.module import TrainingModule
from fcmae.training.out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)

_ROOM = 0.9  # of the device's memory, so that what varies from step to step finds room


def share_of(trainer: L.Trainer, effective_batch: int) -> int:
    """Images of an optimiser step that each device computes, at once or one micro-batch after another.

    Raises:
        UserError: the devices cannot share the step equally.
    """
    devices = trainer.num_devices * trainer.num_nodes
    if effective_batch % devices:
        raise UserError(
            f"effective_batch={effective_batch} is not a multiple of {devices} = {trainer.num_devices} devices x "
            f"{trainer.num_nodes} nodes: change one of them"
        )
    return effective_batch // devices


def largest_micro_batch(
    module: TrainingModule, data: ImageDataModule, device: torch.device, *, precision: str, share: int
) -> int:
    """The largest divisor of `share` with which a training step fits into the device's memory.

    A step is tried with the module itself on random images: forward, backward, and beside them as much memory as the
    gradients, the optimiser's moments and DDP's buckets take. Sharded training needs less.

    Args:
        module: to be trained; it comes back as it was, on the CPU.
        data: says how large images are, and how many crops of each there are.
        device: a CUDA device.
        precision: of the trainer, such as `bf16-mixed`.
        share: images per optimiser step and device.

    Raises:
        UserError: it is no CUDA device, or not even the smallest micro-batch fits.
    """
    if device.type != "cuda":
        raise UserError("data.batch_size=auto tries what a CUDA device's memory takes: give a number, such as 64, here")
    torch.cuda.set_device(device)
    channels, (height, width) = data.in_chans, data.size

    def step(batch_size: int) -> None:
        images = torch.randn(batch_size, channels, height, width, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        moments = [torch.empty_like(p) for p in module.parameters() if p.requires_grad for _ in range(3)]
        kind = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
        with torch.autocast("cuda", kind or torch.float32, enabled=kind is not None):
            loss = module.loss(module.example(images))
        loss.backward()
        del moments

    def fits(batch_size: int) -> bool:
        torch.cuda.reset_peak_memory_stats(device)
        step(batch_size)
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_reserved(device) <= _ROOM * total

    with torch.random.fork_rng(devices=[device]):
        module.to(device)
        try:
            found = first_that_fits(candidates(share, multiple_of=2 * data.repeats), fits, lambda: _forget(module))
        finally:
            module.to("cpu")
            _forget(module)
    if found is None:
        raise UserError(
            f"not even {2 * data.repeats} images of {channels}x{height}x{width} fit into the memory of {device}: use "
            "model.grad_checkpointing=block or smaller images; or trainer=fsdp, whose sharding this does not try, and "
            "a number for data.batch_size (docs/scaling.md has a table)"
        )
    log.info("micro-batch: %d images per device fit, %d of them make a step", found, share // found)
    return found


def candidates(share: int, *, multiple_of: int) -> list[int]:
    """The divisors of `share` that are such multiples, the largest first.

    Raises:
        UserError: there are none.
    """
    found = [size for size in range(share, 0, -1) if share % size == 0 and size % multiple_of == 0]
    if not found:
        raise UserError(
            f"effective_batch leaves each device {share} images, no multiple of {multiple_of}: make it a multiple, so "
            "that crops of a picture and pairs of images stay together"
        )
    return found


def first_that_fits(sizes: list[int], fits: Callable[[int], bool], forget: Callable[[], None]) -> int | None:
    """The first size that fits.

    Args:
        sizes: to try, in this order.
        fits: tries; may raise what means that memory does not suffice.
        forget: gives the memory of a trial back.
    """
    for size in sizes:
        try:
            if fits(size):
                return size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        forget()  # outside of `except`: the error holds on to every frame, and so to the memory
    return None


def _forget(module: nn.Module) -> None:
    module.zero_grad(set_to_none=True)
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
