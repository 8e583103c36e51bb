"""What is measured: a pre-training step of our model and of its baseline, on the same images, masks and weights."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fcmae.benchmark import measure
from fcmae.benchmark.dense import as_dense
from fcmae.errors import UserError
from fcmae.masking import Mask
from fcmae.models.fcmae import FCMAE

BASELINE = "dense"
PRECISIONS = ("32", "bf16")
CLOCKS: Mapping[str, measure.Clock] = {
    "process": measure.process_clock,
    "wall": measure.wall_clock,
    "cuda": measure.cuda_clock,
}


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Under which conditions to measure.

    Attributes:
        batch_size: images per step.
        image_size: (height, width) in pixels.
        precision: `32`, or `bf16` for autocast to bfloat16.
        device: `cpu`, `cuda` or `cuda:<index>`.
        threads: CPU threads of torch.
        repeats: steps of each variant that are timed.
        warmup: steps of each variant before those.
        clock: `process` (CPU seconds of the process: robust on a shared machine), `wall`, or `cuda` (events); None
            chooses `cuda` on CUDA, `process` with one thread and `wall` with several.
        compile: put the models through `torch.compile`.
        seed: of images and masks.

    Raises:
        UserError: a value out of its bounds, or a device that this machine lacks.
    """

    batch_size: int
    image_size: tuple[int, int]
    precision: str = "32"
    device: str = "cpu"
    threads: int = 1
    repeats: int = 9
    warmup: int = 2
    clock: str | None = None
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("threads", 1), ("repeats", 1), ("warmup", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise UserError(f"{name}={value!r} is not a whole number from {least}: use {least} or more")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision={self.precision!r} is unknown: use {' or '.join(PRECISIONS)}")
        on_cuda = _device_type(self.device) == "cuda"
        if self.clock is None:
            object.__setattr__(self, "clock", "cuda" if on_cuda else "process" if self.threads == 1 else "wall")
        if self.clock not in CLOCKS or on_cuda != (self.clock == "cuda"):
            choices = "cuda" if on_cuda else "process or wall"
            raise UserError(f"clock={self.clock!r} does not measure device={self.device!r}: use {choices}")

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class Measurement:
    """What one variant costs.

    Attributes:
        times: seconds per step.
        saved_bytes: what autograd keeps for the backward pass, without parameters and images.
        peak_bytes: memory of the device at the worst moment of a step, with weights, optimiser state and images; None
            where the system does not tell.
    """

    times: measure.Times
    saved_bytes: int
    peak_bytes: int | None


def build_variants(model: FCMAE) -> dict[str, FCMAE]:
    """The baseline first, then what is compared with it; all with the same weights, none of them shared."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".grn." in name:  # a fresh GRN does nothing, so that an error in it would not show
                nn.init.normal_(parameter, std=0.1)
    return {BASELINE: as_dense(model), "packed": model}


def measure_training(
    variants: Mapping[str, FCMAE],
    conditions: Conditions,
    progress: Callable[[str], object] = lambda name: None,
) -> dict[str, Measurement]:
    """Measures forward, backward, optimiser step and zeroing of gradients of every variant.

    Args:
        variants: by name, the baseline among them, as from `build_variants`. They are moved to the device and trained.
        conditions: how to measure.
        progress: told the name of each step that is done, warm-up included.

    Raises:
        UserError: the images do not fit the model.
        RuntimeError: the variants do not agree, so that comparing their speed would mean nothing.
    """
    with _environment(conditions):
        for variant in variants.values():
            variant.train().to(conditions.device).to(memory_format=torch.channels_last)
        images = _random_images(variants[BASELINE], conditions)
        masks = [variants[BASELINE].masking(images) for _ in range(conditions.warmup + conditions.repeats)]
        check_agreement(variants, images, masks[0], conditions.seed)

        steps, saved, peak = {}, {}, {}
        for name, variant in variants.items():
            if conditions.compile:
                variant.compile()
            optimizer = _optimizer(variant)
            steps[name] = training_step(variant, optimizer, images, masks, conditions.precision)
            saved[name] = measure.saved_activations(
                partial(forward, variant, images, masks[0], conditions.precision),
                exclude=[images, *variant.parameters()],
            )
            peak[name] = _peak(steps[name], variant, optimizer, images)
        clock = CLOCKS[str(conditions.clock)]
        times = measure.measure_times(
            steps, clock, repeats=conditions.repeats, warmup=conditions.warmup, progress=progress
        )
    return {name: Measurement(times[name], saved[name], peak[name]) for name in variants}


def forward(model: FCMAE, images: Tensor, mask: Mask, precision: str) -> Tensor:
    """The loss, a scalar, of images (B, C, H, W)."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        loss: Tensor = model(images, mask).loss
        return loss


def training_step(
    model: FCMAE, optimizer: torch.optim.Optimizer, images: Tensor, masks: Sequence[Mask], precision: str
) -> measure.Step:
    """A whole training step on images (B, C, H, W); each call takes the next mask, from the first again at the end."""
    upcoming = itertools.cycle(masks)

    def step() -> None:
        forward(model, images, next(upcoming), precision).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def check_agreement(variants: Mapping[str, FCMAE], images: Tensor, mask: Mask, seed: int) -> None:
    """Compares every variant with the baseline on one batch (B, C, H, W), in float32.

    Raises:
        RuntimeError: the loss differs by more than 1e-4, or the prediction by more than 1e-2, relative.
    """
    outputs = {}
    for name, variant in variants.items():
        torch.manual_seed(seed)  # the same stochastic depth for all
        outputs[name] = variant(images, mask, whole=True)
    expected = outputs[BASELINE]
    for name, output in outputs.items():
        loss_error = float((output.loss - expected.loss).abs() / expected.loss.abs())
        pred_error = float((output.pred - expected.pred).norm() / expected.pred.norm())
        if not (loss_error <= 1e-4 and pred_error <= 1e-2):  # also when one is not a number
            raise RuntimeError(
                f"{name} does not compute what {BASELINE} computes: the loss differs by {loss_error:.1e}, "
                f"the prediction by {pred_error:.1e} (relative); nothing was measured"
            )


@contextlib.contextmanager
def _environment(conditions: Conditions) -> Iterator[None]:
    """Threads, device and random numbers as the conditions want them; afterwards as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(conditions.threads)
    devices = [torch.device(conditions.device)] if conditions.on_cuda else []
    current = torch.cuda.device(devices[0]) if devices else contextlib.nullcontext()
    try:
        with torch.random.fork_rng(devices), current:
            torch.manual_seed(conditions.seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _random_images(model: FCMAE, conditions: Conditions) -> Tensor:
    shape = (conditions.batch_size, model.encoder.in_chans, *conditions.image_size)
    return torch.randn(shape, device=conditions.device).contiguous(memory_format=torch.channels_last)


def _optimizer(model: FCMAE) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)


def _peak(step: measure.Step, model: FCMAE, optimizer: torch.optim.Optimizer, images: Tensor) -> int | None:
    step()  # the first step allocates the optimiser's state
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    held = sum(tensor.nbytes for tensor in [images, *model.parameters(), *states] if tensor.device == images.device)
    beyond = measure.cuda_peak(step) if images.is_cuda else measure.cpu_peak(step)
    return None if beyond is None else held + beyond


def _device_type(name: str) -> str:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name!r} is unknown: use cpu, cuda or cuda:<index>")
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"device={name!r} was asked for, but torch sees {count} CUDA devices: use another, or cpu")
    return device.type
