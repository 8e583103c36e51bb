"""What is measured: a pre-training step of every variant, on the same images, masks and weights."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fcmae.benchmark import measure
from fcmae.benchmark.conditions import Conditions, environment
from fcmae.benchmark.dense import MaskedDenseEncoder, compiled_masked_block
from fcmae.benchmark.variants import OF_OTHER_FEATURES
from fcmae.masking import Mask
from fcmae.models.block import compiled_block
from fcmae.models.fcmae import FCMAE


@dataclass(frozen=True)
class Measurement:
    """What one variant costs.

    Attributes:
        times: seconds per step.
        saved_bytes: what autograd keeps for the backward pass, without parameters and images.
        peak_bytes: memory of the device at the worst moment of a step, with weights, gradients, optimiser state and
            images; None where the system does not tell.
    """

    times: measure.Times
    saved_bytes: int
    peak_bytes: int | None


def measure_training(
    variants: Mapping[str, FCMAE],
    conditions: Conditions,
    progress: Callable[[str], object] = lambda name: None,
) -> dict[str, Measurement]:
    """Measures a training step of every variant, see `training_step`.

    Args:
        variants: as `build_variants` makes them. They are trained on the way.
        conditions: how to measure.
        progress: told the variant's name after each of its steps.

    Raises:
        RuntimeError: two variants do not compute the same (`check_agreement`).
    """
    with environment(conditions):
        for variant in variants.values():
            place(variant, conditions.device)
        any_variant = next(iter(variants.values()))
        images = _random_images(any_variant, conditions)
        masks = [any_variant.masking(images) for _ in range(conditions.warmup + conditions.repeats)]
        check_agreement(variants, images[:2], any_variant.masking(images[:2]), conditions.seed)

        steps, saved, peak = {}, {}, {}
        for name, variant in variants.items():
            if name.endswith(" compiled") or (conditions.compile and name != "dense"):
                compile_parts(variant)
            optimizer = build_optimizer(variant) if conditions.optimizer else None
            steps[name] = training_step(variant, optimizer, images, masks, conditions.precision)
            peak[name] = _peak(steps[name], variant, optimizer, images)
            saved[name] = measure.saved_activations(
                partial(forward, variant, images, masks[0], conditions.precision),
                exclude=[images, *variant.parameters()],
            )
        times = measure.measure_times(
            steps, conditions.run, repeats=conditions.repeats, warmup=conditions.warmup, progress=progress
        )
    return {name: Measurement(times[name], saved[name], peak[name]) for name in variants}


def place(model: FCMAE, device: str) -> FCMAE:
    """The model itself, ready to train on a device."""
    return model.to(device=device).to(memory_format=torch.channels_last).train()


def compile_parts(model: FCMAE) -> None:
    """`torch.compile` block by block, as pre-training does it."""
    model.encoder.run_block = model.decoder.run_block = compiled_block()
    if isinstance(model.encoder, MaskedDenseEncoder):
        model.encoder.run_masked_block = compiled_masked_block()


def forward(model: FCMAE, images: Tensor, mask: Mask | None, precision: str) -> Tensor:
    """The loss, a scalar, of images (B, C, H, W)."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        loss: Tensor = model(images, mask).loss
        return loss


def training_step(
    model: FCMAE, optimizer: torch.optim.Optimizer | None, images: Tensor, masks: Sequence[Mask], precision: str
) -> measure.Step:
    """Forward, backward, the optimiser's step if there is one, and zeroing of gradients, on images (B, C, H, W).

    Each call takes the next mask, from the first again at the end.
    """
    upcoming = itertools.cycle(masks)

    def step() -> None:
        forward(model, images, next(upcoming), precision).backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()

    return step


def build_optimizer(model: FCMAE) -> torch.optim.Optimizer:
    """AdamW with the published recipe's numbers."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)


@torch.no_grad()
def check_agreement(variants: Mapping[str, FCMAE], images: Tensor, mask: Mask, seed: int) -> None:
    """Compares all variants that should give the same numbers with the first of them, on one batch, in float32.

    Raises:
        RuntimeError: the loss differs by more than 1e-4, or the prediction by more than 1e-2, relative.
    """
    outputs = {}
    for name, variant in variants.items():
        if name == OF_OTHER_FEATURES:
            continue
        torch.manual_seed(seed)  # the same stochastic depth for all
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            outputs[name] = variant(images, mask, whole=True)
    first, expected = next(iter(outputs.items()))
    for name, output in outputs.items():
        loss_error = float((output.loss - expected.loss).abs() / expected.loss.abs())
        pred_error = float((output.pred - expected.pred).norm() / expected.pred.norm())
        if not (loss_error <= 1e-4 and pred_error <= 1e-2):  # also when one is not a number
            raise RuntimeError(
                f"{name} does not compute what {first} computes: the loss differs by {loss_error:.1e}, "
                f"the prediction by {pred_error:.1e} (relative); nothing was measured"
            )


def _random_images(model: FCMAE, conditions: Conditions) -> Tensor:
    shape = (conditions.batch_size, model.encoder.in_chans, *conditions.image_size)
    return torch.randn(shape, device=conditions.device).contiguous(memory_format=torch.channels_last)


def _peak(step: measure.Step, model: FCMAE, optimizer: torch.optim.Optimizer | None, images: Tensor) -> int | None:
    step()  # the first step compiles, and allocates the optimiser's state
    states = [] if optimizer is None else [value for state in optimizer.state.values() for value in state.values()]
    tensors = [images, *model.parameters(), *(value for value in states if isinstance(value, Tensor))]
    held = sum(tensor.nbytes for tensor in tensors if tensor.device == images.device)
    beyond = measure.cuda_peak(step) if images.is_cuda else measure.cpu_peak(step)
    return None if beyond is None else held + beyond
