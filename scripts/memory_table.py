"""Memory that pre-training takes of each device, by size of the model: computed without a GPU, see docs/scaling.md.

python scripts/memory_table.py          # the table
python scripts/memory_table.py check    # what is computed, against what steps on this machine's CPU were seen to take

Training steps are run on tensors that have shapes and no memory (torch's FakeTensorMode), with FSDP's own code on one
of n ranks that do not exist, and what is alive is added up. So nothing is counted that torch's allocator or libraries
take beside the tensors: workspaces, fragmentation, the CUDA context.
"""

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from measure_ranks import table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fcmae import FCMAE, create_model
from fcmae.benchmark.conditions import Conditions
from fcmae.benchmark.step import build_optimizer, forward, measure_training
from fcmae.engines.operators import Kernels, build_engine
from fcmae.models.block import Recompute
from fcmae.models.convnext import SIZES
from fcmae.training.sharding import all_devices, shard

RECOMPUTED: tuple[Recompute, ...] = ("none", "mlp", "block")
SHARDED = ("large", "huge")  # smaller ones have no need
SHARDS = 8
CARDS = (16, 24, 40, 80, 141)  # in units of 1e9 bytes
TAKEN = 0.9  # of a card: 10 % to spare
BATCHES = 16, 1024  # through whose peaks the straight line goes


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training step of a size at 224 px, mask ratio 0.6.

    Attributes:
        size: of the model.
        recompute: `grad_checkpointing`.
        precision: `bf16` for autocast, or `32`.
        devices: over which FSDP shards it; 1: not at all.
        accumulated: micro-batches per step. The gradients of the first stay while the second is computed.
    """

    size: str
    recompute: Recompute = "none"
    precision: str = "bf16"
    devices: int = 1
    accumulated: int = 2

    def model(self, engine: str = "torch") -> FCMAE:
        """The model."""
        return create_model(self.size, grad_checkpointing=self.recompute, engine=engine).train()


class LiveMemory(TorchDispatchMode):
    """Adds up the storages that are alive, and counts operators.

    Attributes:
        bytes: alive now.
        peak: alive at the worst moment.
        resting: alive between two steps.
        operators: called so far, as torch counts them: a convolution is one, and so is a view.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = self.resting = self.operators = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.operators += function.namespace != "prim"  # those ask for a device, and start nothing
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.hold(value)
        return result

    def hold(self, tensor: Tensor) -> None:
        """Counts a tensor's storage for as long as it lives; of a sharded one, this rank's."""
        tensor = getattr(tensor, "_local_tensor", tensor)
        storage = tensor.untyped_storage()
        if tensor.is_meta or storage._cdata in self._sizes:
            return
        self._set(storage._cdata, storage.nbytes())
        weakref.finalize(storage, self._drop, storage._cdata)

    def __enter__(self) -> Any:
        self._resize = torch.UntypedStorage.resize_  # by which FSDP frees parameters and gathers them again

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = self._resize(storage, size)
            if storage._cdata in self._sizes:
                self._set(storage._cdata, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def _set(self, key: int, size: int) -> None:
        self.bytes += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.bytes)

    def _drop(self, key: int) -> None:
        self._set(key, 0)
        del self._sizes[key]


def peak_bytes(case: Case, batch: int) -> int:
    """At the worst moment of a step: weights, gradients, AdamW's moments, images, activations, temporaries."""
    return step_without_memory(case, batch).peak


def step_without_memory(case: Case, batch: int) -> LiveMemory:
    """What two steps hold, and the second one calls; the first makes the moments."""
    with torch.device("meta"):
        model = case.model()
    if case.devices > 1:
        dist.init_process_group("fake", rank=0, world_size=case.devices, store=FakeStore())
        shard(model, all_devices("cpu"))
    live = LiveMemory()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), live:
            model.to_empty(device="cpu")
            model.encoder.engine = model.decoder.engine = _SHAPES
            for parameter in model.parameters():
                live.hold(parameter)
            images = torch.empty(batch, 3, 224, 224)
            optimizer, mask = build_optimizer(model), model.masking(images)
            for _ in range(2):
                live.resting, live.operators = live.bytes, 0
                for _ in range(case.accumulated):
                    forward(model, images, mask, case.precision).backward()
                optimizer.step()
                optimizer.zero_grad()
    finally:
        if case.devices > 1:
            dist.destroy_process_group()
    return live


# The operators that all engines with kernels share; without memory, the kernels themselves are not called.
_SHAPES = build_engine("shapes", cast(Kernels, None))


def line(case: Case) -> tuple[float, float]:
    """The peak as a straight line: bytes without images, bytes per image."""
    few, many = (peak_bytes(case, batch) for batch in BATCHES)
    slope = (many - few) / (BATCHES[1] - BATCHES[0])
    return few - BATCHES[0] * slope, slope


def memory() -> str:
    """A line for each size and trainer, in Markdown; in threes: for each kind of recomputing."""
    rows = []
    for size in SIZES:
        encoder, decoder = (count / 1e6 for count in parameters(size))
        for devices in (1, SHARDS) if size in SHARDED else (1,):
            lines = [line(Case(size=size, recompute=kind, devices=devices)) for kind in RECOMPUTED]
            buckets = 4e6 * (encoder + decoder) if devices == 1 else 0  # DDP's: the gradients once more
            state = 16e6 * (encoder + decoder) / devices + buckets
            cells = [f"{encoder:.1f} + {decoder:.1f}", f"{state / 1e9:.3g}", f"{(lines[0][0] + buckets) / 1e9:.2f}"]
            cells.append(" / ".join(f"{slope / 1e6:.1f}" for _, slope in lines))
            for card in CARDS:
                room = card * 1e9 * TAKEN - buckets
                cells.append(" / ".join(micro_batch(room, start, slope) for start, slope in lines))
            rows.append([size, f"fsdp, {devices}" if devices > 1 else "ddp", *cells])
    columns = ["size", "trainer", "parameters, M", "state, GB", "without images, GB", "per image, MB"]
    return table([*columns, *(f"{card} GB" for card in CARDS)], rows)


def micro_batch(room: float, start: float, slope: float) -> str:
    """The images for which a device has room, as a multiple of eight where there are so many; a dash for none."""
    count = max(int((room - start) / slope), 0)
    return str(count - count % 8 if count > 8 else count or "–")


def parameters(size: str) -> tuple[int, int]:
    """Those of encoder and decoder."""
    with torch.device("meta"):
        model = create_model(size, engine="torch")
    return tuple(sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.decoder))  # type: ignore


def check(cases: Sequence[tuple[str, int]] = (("tiny", 32), ("base", 16))) -> str:
    """Computed and seen peaks of steps on engine `cpu`, in Markdown."""
    rows = []
    for size, batch in cases:
        conditions = Conditions(batch_size=batch, image_size=(224, 224), precision="bf16", repeats=1, warmup=0)
        for recompute in RECOMPUTED:
            case = Case(size=size, recompute=recompute, accumulated=1)
            seen = measure_training({"cpu": case.model("cpu")}, conditions)["cpu"].peak_bytes
            assert seen is not None, "the kernel of this system does not count resident memory"
            computed = peak_bytes(case, batch)
            cells = f"{computed / 1e6:.0f}", f"{seen / 1e6:.0f}", f"{seen / computed - 1:+.1%}"
            rows.append([size, str(batch), recompute, *cells])
    return table(["size", "batch", "grad_checkpointing", "computed, MB", "seen, MB", "difference"], rows)


if __name__ == "__main__":
    command: Callable[[], str] = check if sys.argv[1:] == ["check"] else memory
    print(command())
