"""Under which conditions to measure: what every figure must be read with."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from fcmae.benchmark import measure
from fcmae.errors import UserError

PRECISIONS: Mapping[str, torch.dtype] = {"32": torch.float32, "bf16": torch.bfloat16}
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
        compile: put our models through `torch.compile`; the dense baseline's two kinds have names of their own.
        optimizer: a step ends with AdamW's; without, it is forward, backward and the zeroing of gradients.
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
    optimizer: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("threads", 1), ("repeats", 1), ("warmup", 0), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UserError(f"{name}={value!r} is not a whole number from {least}: use {least} or more")
        for name in ("compile", "optimizer"):
            if type(getattr(self, name)) is not bool:
                raise UserError(f"{name}={getattr(self, name)!r} is unknown: use true or false")
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

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the large products are computed."""
        return PRECISIONS[self.precision]

    @property
    def run(self) -> measure.Clock:
        """The clock, as a function that runs a step and says how long it took."""
        return CLOCKS[str(self.clock)]


@contextlib.contextmanager
def environment(conditions: Conditions) -> Iterator[None]:
    """Threads, device and random numbers as the conditions want them; afterwards as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(conditions.threads)
    devices = [torch.device(conditions.device)] if conditions.on_cuda else []
    current = torch.cuda.device(devices[0]) if devices else contextlib.nullcontext()
    cudnn = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True  # the dense network's convolutions: its first guess need not be its best
    try:
        with torch.random.fork_rng(devices), current:
            torch.manual_seed(conditions.seed)
            yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = cudnn


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
