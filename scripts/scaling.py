"""Predicts how pre-training scales to hundreds of GPUs, see docs/scaling.md.

python scripts/scaling.py                      # the tables of the page
python scripts/scaling.py used=0.4 hop=5e-5    # with other inputs
python scripts/scaling.py base=1850            # with the images per second that one GPU of yours takes, of a size

Nothing here was measured on a GPU. What vendors publish and what is merely assumed is in `INPUTS`; operations and
parameters are counted from the models.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from measure_ranks import table
from memory_table import Case, parameters, step_without_memory

from fcmae import create_model
from fcmae.benchmark.arithmetic import flop_per_step

INPUTS = {
    "peak": (989e12, "operations per second of a GPU in bf16: NVIDIA's H100 SXM data sheet, without sparsity"),
    "used": (0.5, "the share of it that a step reaches: assumed"),
    "operator": (8e-6, "seconds in which the host starts one operator, views included: assumed"),
    "nvlink": (
        450e9,
        "bytes per second and direction of a GPU within its node: the same data sheet, 900 GB/s both ways",
    ),
    "reached": (0.8, "the share of a link's speed that an exchange reaches: assumed"),
    "hop": (30e-6, "seconds for one number from a process to the next over TCP: assumed"),
    "bucket": (25 * 2**20, "bytes that DDP exchanges at once: PyTorch's default"),
    "batch": (4096, "effective batch: the published recipe"),
    "micro_batch": (512, "images that a GPU takes at once, at most; the rest is accumulated"),
    "files": (1.43e-3, "seconds of a core per JPEG of 500 x 375: docs/benchmarks.md, `folder` as beside a GPU"),
    "shards": (0.85e-3, "the same, `shards`"),
}
Inputs = Mapping[str, float]  # by the names above; a size's name: images per second of one GPU, measured
SLOW = 0.1  # of the peak: another assumption, beside `used`
GPUS_PER_NODE = 8
SIZES = ("tiny", "base", "huge")
COUNTS = (8, 64, 256, 512)
NETWORKS = {  # bytes per second and direction that leave a node of eight GPUs
    "1 x 100 Gbit/s": 12.5e9,
    "1 x 400": 50e9,
    "8 x 200": 200e9,
    "8 x 400": 400e9,
}
FASTEST = NETWORKS["8 x 400"]
DISKS = (0.2e9, 1e9, 5e9)  # bytes per second
SAVED_EVERY = 1000  # steps


@dataclass(frozen=True)
class Work:
    """What a model asks of a step. `operators` are those of a micro-batch; the optimiser's are among them."""

    parameters: int
    encoder: int
    flop_per_image: float
    operators: int


@cache
def work(size: str) -> Work:
    """Counted, not run."""
    with torch.device("meta"):
        model = create_model(size, engine="torch")
    flop = flop_per_step(model, torch.empty(2, 3, 224, 224, device="meta")) / 2
    encoder, decoder = parameters(size)
    return Work(encoder + decoder, encoder, flop, step_without_memory(Case(size=size, accumulated=1), 2).operators)


@dataclass(frozen=True)
class Step:
    """Of an optimiser step: micro-batches and their images; seconds of the GPU and of the host for one of them; of the
    exchange; of the whole."""

    accumulated: int
    images: int
    compute: float
    host: float
    exchange: float
    total: float

    @property
    def efficiency(self) -> float:
        """The share of the time in which the GPU computes at its speed."""
        return self.accumulated * self.compute / self.total


def ddp(inputs: Inputs, size: str, gpus: int, network: float) -> Step:
    """The gradients go round during the last micro-batch's backward pass; what does not fit beside it is waited for."""
    accumulated, images, compute, host = _micro_batch(inputs, size, gpus)
    gradients = 4 * work(size).parameters
    exchange = 2 * (gpus - 1) / gpus * gradients / bandwidth(inputs, gpus, network)
    last_bucket = exchange * min(1, inputs["bucket"] / gradients)
    busy = max(compute, host)
    total = accumulated * busy + max(exchange - 2 / 3 * busy, last_bucket)
    return Step(accumulated, images, compute, host, exchange, total)


def fsdp(inputs: Inputs, size: str, gpus: int, network: float) -> Step:
    """For every micro-batch parameters are gathered twice and gradients scattered once, at best beside all the work."""
    accumulated, images, compute, host = _micro_batch(inputs, size, gpus)
    exchange = 3 * (gpus - 1) / gpus * 4 * work(size).parameters / bandwidth(inputs, gpus, network)
    return Step(accumulated, images, compute, host, exchange, accumulated * max(compute, host, exchange))


def bandwidth(inputs: Inputs, gpus: int, network: float) -> float:
    """Bytes per second at which a ring through all GPUs turns: the narrower of the links within and between nodes."""
    narrowest = inputs["nvlink"] if gpus <= GPUS_PER_NODE else min(inputs["nvlink"], network)
    return inputs["reached"] * narrowest


def agreement(inputs: Inputs, gpus: int) -> float:
    """Seconds of gloo's all-reduce of one number: a ring over the hosts' processes, around which it goes twice."""
    return 2 * (gpus - 1) * inputs["hop"]


def _micro_batch(inputs: Inputs, size: str, gpus: int) -> tuple[int, int, float, float]:
    """How many there are, images, and seconds of the GPU and of the host."""
    share = int(inputs["batch"]) // gpus
    accumulated = -(-share // int(inputs["micro_batch"]))
    images = share // accumulated
    per_second = inputs.get(size) or inputs["used"] * inputs["peak"] / work(size).flop_per_image
    host = work(size).operators * inputs["operator"] + agreement(inputs, gpus)
    return accumulated, images, images / per_second, host


def what_is_counted(inputs: Inputs) -> str:
    """Of the models."""
    rows = []
    for size in SIZES:
        w = work(size)
        rows.append([size, f"{w.parameters / 1e6:.0f}", f"{w.flop_per_image / 1e9:.3g}", str(w.operators)])
    return table(["size", "parameters, M", "GFLOP per image", "operators per micro-batch"], rows)


def what_is_given(inputs: Inputs) -> str:
    """Inputs, and where they are from."""
    told = {name: text for name, (_, text) in INPUTS.items()}
    rows = [[name, f"{value:.4g}", told.get(name, "images per second: given")] for name, value in inputs.items()]
    return table(["input", "value", "what, and whence"], rows)


def steps(inputs: Inputs) -> str:
    """Times, and efficiencies on each network; in pairs: at the share `used` of the peak, and at the other."""
    rows = []
    for size, strategy in [*((size, ddp) for size in SIZES), ("huge", fsdp)]:
        for gpus in COUNTS:
            fast, slow = ([strategy(i, size, gpus, speed) for speed in NETWORKS.values()] for i in _both(inputs))
            pairs = list(zip(fast, slow, strict=True))
            (one, other), batches = pairs[-1], f"{fast[0].accumulated} x {fast[0].images}"
            compute = f"{1e3 * one.accumulated * one.compute:.1f} / {1e3 * other.accumulated * other.compute:.1f}"
            total = f"{1e3 * one.total:.0f} / {1e3 * other.total:.0f}"
            efficiencies = [f"{100 * a.efficiency:.0f} / {100 * b.efficiency:.0f} %" for a, b in pairs]
            host = f"{1e3 * one.accumulated * one.host:.0f}"
            rows.append([f"{size}, {strategy.__name__}", str(gpus), batches, compute, host, total, *efficiencies])
    return table(["", "GPUs", "images each", "GPU, ms", "host, ms", "step, ms", *NETWORKS], rows)


def _both(inputs: Inputs) -> tuple[Inputs, Inputs]:
    return inputs, {**inputs, "used": SLOW}


def agreements(inputs: Inputs) -> str:
    """What it takes to agree before each batch."""
    return table(["ranks", *map(str, COUNTS)], [["ms", *(f"{1e3 * agreement(inputs, n):.1f}" for n in COUNTS)]])


def checkpoints(inputs: Inputs) -> str:
    """How long one takes to write, and which share of the time that is, on 64 GPUs; in pairs as in `steps`."""
    rows = []
    for size in SIZES:
        w = work(size)
        written = 12 * w.parameters + 4 * w.encoder
        between = [SAVED_EVERY * ddp(i, size, 64, FASTEST).total for i in _both(inputs)]
        cells = []
        for seconds in (written / disk for disk in DISKS):
            shares = " / ".join(f"{100 * seconds / (seconds + other):.1f}" for other in between)
            cells.append(f"{seconds:.1f} s, {shares} %")
        rows.append([size, f"{written / 1e9:.2f}", " / ".join(f"{s:.0f}" for s in between), *cells])
    return table(["size", "GB", f"seconds of {SAVED_EVERY} steps", *(f"{disk / 1e9:g} GB/s" for disk in DISKS)], rows)


def reading(inputs: Inputs) -> str:
    """Images that a node takes, and the cores that read so many; in pairs as in `steps`."""
    rows = []
    for size in SIZES:
        rates = [inputs["batch"] / ddp(i, size, GPUS_PER_NODE, FASTEST).total for i in _both(inputs)]
        cores = [" / ".join(f"{rate * inputs[kind]:.0f}" for rate in rates) for kind in ("files", "shards")]
        rows.append([size, " / ".join(f"{rate:.0f}" for rate in rates), *cores])
    return table(["size", "images/s of a node", "cores for files", "cores for shards"], rows)


PARTS = (what_is_given, what_is_counted, steps, agreements, checkpoints, reading)


def read_inputs(arguments: Sequence[str]) -> dict[str, float]:
    """The inputs, some of them as `name=value` gives them.

    Raises:
        ValueError: a name that is none.
    """
    inputs = {name: float(value) for name, (value, _) in INPUTS.items()}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in inputs and name not in SIZES:
            raise ValueError(f"{argument!r} is no input: use {', '.join([*INPUTS, *SIZES])}, as name=number")
        inputs[name] = float(value)
    return inputs


if __name__ == "__main__":
    given = read_inputs(sys.argv[1:])
    for part in PARTS:
        print(part(given), end="\n\n")
