"""The memory that is computed is that which torch takes, and predictions follow their formulas."""

import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fcmae import create_model
from fcmae.benchmark import measure
from fcmae.benchmark.step import forward

SCRIPTS = Path(__file__).parents[1] / "scripts"
DEPTHS, DIMS = [1, 1, 2, 1], [16, 32, 64, 128]
P = {"depths": DEPTHS, "dims": DIMS, "decoder_dim": 64}


@pytest.fixture(scope="module")
def memory() -> Any:
    """scripts/memory_table.py, whose sizes are all a small one."""
    return _script("memory_table")


@pytest.fixture(scope="module")
def scaling() -> Any:
    return _script("scaling")


def _script(name: str) -> Any:
    with mock.patch.object(sys, "path", [str(SCRIPTS), *sys.path]):
        return __import__(name)


@pytest.fixture
def small(memory: Any) -> Any:
    """Cases of a model that is made in no time."""

    class Small(memory.Case):
        def model(self, engine: str = "torch") -> Any:
            return create_model(grad_checkpointing=self.recompute, engine=engine, **P).train()

    return partial(Small, size="custom")


def test_what_is_alive_is_counted_until_it_is_gone(memory: Any) -> None:
    before, live = torch.UntypedStorage.resize_, memory.LiveMemory()
    with FakeTensorMode(), live:
        a = torch.empty(1000)
        b = a[10:] + 1  # 990 numbers more
        assert (live.bytes, live.peak) == (4 * 1990, 4 * 1990)
        view = a.view(10, 100)
        del a
        assert live.bytes == 4 * 1990
        del view
        assert live.bytes == 4 * 990
        b.untyped_storage().resize_(0)
        assert live.bytes == 0
    assert live.peak == 4 * 1990
    assert torch.UntypedStorage.resize_ is before


def test_between_steps_weights_and_moments_are_left(memory: Any, small: Any) -> None:
    """12 bytes per parameter on one device, an eighth of it on each of eight; and 4 more of gradients at the peak."""
    count = sum(p.numel() for p in small().model().parameters())
    alone, eighth = (memory.step_without_memory(small(devices=devices), 1) for devices in (1, 8))
    images = 4 * 3 * 224**2
    assert alone.resting - images == pytest.approx(12 * count, rel=0.02)
    assert eighth.resting - images == pytest.approx(12 * count / 8, rel=0.1)  # the masking's and the mask's come on top
    assert alone.peak > alone.resting + 4 * count > eighth.peak


@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
def test_images_take_what_autograd_keeps_of_them(small: Any, memory: Any, recompute: str) -> None:
    """The slope of the line, beside the saved activations of the real thing."""
    case = small(recompute=recompute)
    _, slope = memory.line(case)
    model = case.model("cpu")

    def saved(batch: int) -> int:
        images = torch.randn(batch, 3, 224, 224)
        step = partial(forward, model, images, model.masking(images), "bf16")
        return measure.saved_activations(step, exclude=[images, *model.parameters()])

    kept = (saved(6) - saved(2)) / 4
    images = 4 * 3 * 224**2
    assert kept + images <= slope * 1.001  # temporaries come on top
    assert slope < 2.5 * (kept + images)


def test_recomputing_takes_less(memory: Any, small: Any) -> None:
    none, mlp, block = (memory.peak_bytes(small(recompute=kind), 16) for kind in memory.RECOMPUTED)
    assert block < mlp < none


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a build of torch that knows CUDA; no GPU")
def test_a_gpu_keeps_what_a_cpu_keeps(memory: Any) -> None:
    """For the backward pass, in bytes: shapes on a CUDA device that is not there. Autocast differs from the CPU's."""

    def kept(device: str) -> int:
        found: dict[int, torch.UntypedStorage] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            found[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.device("meta"):
            model = create_model(engine="torch", **P).train()
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device=device)
            model.encoder.engine = model.decoder.engine = memory._SHAPES
            images = torch.empty(2, 3, 224, 224, device=device)
            mask = model.masking(images)
            torch.set_autocast_enabled(device, True)  # torch.autocast would find that there is no GPU
            torch.set_autocast_dtype(device, torch.bfloat16)
            try:
                with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                    model(images, mask)
            finally:
                torch.clear_autocast_cache()
                torch.set_autocast_enabled(device, False)
        return sum(storage.nbytes() for storage in found.values())

    assert kept("cpu") <= kept("cuda") <= 1.02 * kept("cpu")  # whose norms' statistics are of two bytes, not of four


@pytest.mark.parametrize(
    ("room", "fits"), [(99, "–"), (100, "–"), (109, "–"), (175, "7"), (185, "8"), (350, "24"), (10_100, "1000")]
)
def test_the_micro_batch_fits_beside_the_rest(memory: Any, room: float, fits: str) -> None:
    assert memory.micro_batch(room, start=100.0, slope=10.0) == fits


@pytest.fixture
def inputs(scaling: Any) -> dict[str, float]:
    given: dict[str, float] = scaling.read_inputs([])
    return given


def test_gradients_are_waited_for_when_the_network_is_slow(scaling: Any, inputs: dict[str, float]) -> None:
    slow, fast = (scaling.ddp(inputs, "base", 64, network) for network in (1e9, 400e9))
    gradients = 4 * scaling.work("base").parameters
    assert slow.exchange == pytest.approx(2 * 63 / 64 * gradients / (0.8 * 1e9))
    busy = max(slow.compute, slow.host)
    assert slow.total == pytest.approx(busy / 3 + slow.exchange)  # hidden behind the backward pass, two thirds
    assert busy < fast.total < 1.05 * busy
    one_node = (scaling.ddp(inputs, "base", 8, network).total for network in (1.0, 400e9))
    assert len(set(one_node)) == 1, "one node needs no network"


def test_images_are_dealt_out_and_accumulated(scaling: Any, inputs: dict[str, float]) -> None:
    for gpus in (1, *scaling.COUNTS):
        step = scaling.ddp(inputs, "tiny", gpus, 400e9)
        assert step.accumulated * step.images * gpus == inputs["batch"]
        assert step.images <= inputs["micro_batch"]
        assert 0 < step.efficiency <= 1


def test_fsdp_exchanges_for_every_micro_batch(scaling: Any) -> None:
    inputs = scaling.read_inputs(["micro_batch=32"])
    step = scaling.fsdp(inputs, "base", 64, 1e9)
    assert step.exchange == pytest.approx(1.5 * scaling.ddp(inputs, "base", 64, 1e9).exchange)
    assert (step.accumulated, step.total) == (2, 2 * step.exchange)


def test_what_was_measured_takes_the_place_of_what_is_assumed(scaling: Any) -> None:
    inputs = scaling.read_inputs(["base=1000", "hop=5e-5"])
    assert scaling.ddp(inputs, "base", 64, 1e9).compute == pytest.approx(64 / 1000)
    assert scaling.agreement(inputs, 512) == pytest.approx(1022 * 5e-5)
    with pytest.raises(ValueError, match="'bass=1000' is no input: use peak, "):
        scaling.read_inputs(["bass=1000"])


def test_the_page_shows_what_the_script_prints(scaling: Any, inputs: dict[str, float]) -> None:
    """The tables that cost little to make; the others were made by the commands beside them."""
    page = (SCRIPTS.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
    for part in scaling.PARTS:
        for line in part(inputs).splitlines():
            assert line in page, f"run scripts/scaling.py again: docs/scaling.md lacks {line}"
