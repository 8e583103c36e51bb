"""The benchmark compares like with like and reports what it measured. How fast anything is, is not tested."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fcmae
from fcmae.benchmark import doctor
from fcmae.benchmark.arithmetic import flop_per_step, matmul_peak
from fcmae.benchmark.conditions import Conditions
from fcmae.benchmark.dense import MaskedDenseEncoder, as_dense
from fcmae.benchmark.measure import Times, cpu_peak, measure_times, process_clock, saved_activations, wall_clock
from fcmae.benchmark.same_kernels import as_same_kernels
from fcmae.benchmark.step import build_optimizer, check_agreement, measure_training, training_step
from fcmae.benchmark.variants import BASELINES, build_variants
from fcmae.engines import Engine, get_engine
from fcmae.engines.torch import engine as torch_engine
from fcmae.training.out_of_memory import within_memory

MICRO = {"depths": [1, 1, 2, 1], "dims": [8, 16, 32, 64], "decoder_dim": 16, "image_size": 96}


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ("atto", {"depths": [1, 1, 2, 1]}),  # 1x1 convolutions in the MLPs
        ("tiny", {"depths": [1, 1, 2, 1]}),  # linear layers
        ("custom", MICRO | {"patch_size": 64, "image_size": 192, "grn_scope": "batch"}),
        ("custom", MICRO | {"grad_checkpointing": "block", "in_chans": 2}),
    ],
)
def test_dense_baseline_is_the_packed_model(
    size: str,
    options: dict[str, Any],
    randomise: Callable[[nn.Module], nn.Module],
    draw_mask: Callable[..., fcmae.Mask],
) -> None:
    packed = fcmae.create_model(size, **({"image_size": 96} | options)).double().train()
    randomise(packed)
    dense = as_dense(packed)
    assert isinstance(dense.encoder, MaskedDenseEncoder)
    assert dense.training
    assert {name: value.data_ptr() for name, value in dense.state_dict().items()}.keys() == packed.state_dict().keys()

    patch = options.get("patch_size", 32)
    images = torch.randn(3, options.get("in_chans", 3), 3 * patch, 4 * patch, dtype=torch.float64)
    mask = draw_mask(3, 3, 4, 5)
    results = []
    for model in (packed, dense):
        inputs = {name: p for name, p in model.named_parameters() if p.requires_grad} | {"images": images.clone()}
        inputs["images"].requires_grad_()
        loss, pred, _ = model(inputs["images"], mask, whole=True)
        gradients = torch.autograd.grad(loss + pred.square().mean(), list(inputs.values()))
        results.append({"loss": loss.detach(), "pred": pred.detach()} | dict(zip(inputs, gradients, strict=True)))

    for name, ours in results[0].items():
        assert ours.any(), f"{name} is zero: the test shows nothing"
        torch.testing.assert_close(results[1][name], ours, rtol=1e-9, atol=1e-12 * ours.abs().max().item(), msg=name)


def test_variants_share_no_weights() -> None:
    variants = build_variants(fcmae.create_model(**MICRO), baselines=tuple(BASELINES))
    assert list(variants) == ["dense", "dense compiled", "same kernels", "packed"]
    places = [{parameter.data_ptr() for parameter in variant.parameters()} for variant in variants.values()]
    assert len(set.union(*places)) == sum(map(len, places))
    values = [torch.cat([p.flatten() for p in variant.parameters()]) for variant in variants.values()]
    assert all(torch.equal(value, values[0]) for value in values)


@pytest.mark.parametrize(("patch", "grn_scope"), [(32, "image"), (64, "image"), (32, "batch")])
def test_same_kernels_sees_everything_and_keeps_what_is_visible(
    patch: int, grn_scope: Any, randomise: Callable[[nn.Module], nn.Module], draw_mask: Callable[..., fcmae.Mask]
) -> None:
    options = MICRO | {"image_size": 3 * patch, "patch_size": patch, "grn_scope": grn_scope}
    packed = fcmae.create_model(**options).double()
    randomise(packed)
    full = as_same_kernels(packed)
    images, mask = torch.randn(2, 3, 3 * patch, 3 * patch, dtype=torch.float64), draw_mask(2, 3, 3, 4)
    everything = fcmae.Mask.everything(2, 3, 3)
    of_all = packed.encoder(images, everything)  # (B, C, 9*p, p)
    torch.testing.assert_close(full.encoder(images, everything), of_all, rtol=1e-12, atol=0)

    p = patch // 32
    seen = of_all.view(2, 64, 9, p, p).gather(2, mask.index.view(2, 1, 4, 1, 1).expand(-1, 64, -1, p, p))
    torch.testing.assert_close(full.encoder(images, mask), seen.view(2, 64, 4 * p, p), rtol=1e-12, atol=0)
    assert full(images, mask).pred.shape == packed(images, mask).pred.shape
    assert not torch.equal(full.encoder(images, mask), packed.encoder(images, mask))


def test_saved_activations_counts_each_storage_once() -> None:
    weight = nn.Parameter(torch.randn(10, 20))
    images = torch.randn(5, 10, requires_grad=True)

    def forward() -> Tensor:
        hidden = images @ weight  # saves images and weight, which do not count
        wave = hidden.sin()  # saves hidden: 5 * 20 * 4 bytes
        power = wave * wave.view(5, 20)  # saves wave, twice: 5 * 20 * 4 bytes
        return (power * images.detach().sum()).sum()  # saves the sum of images: 4 bytes

    assert saved_activations(forward, exclude=[images, weight]) == 2 * 5 * 20 * 4 + 4
    assert saved_activations(forward) == 2 * 5 * 20 * 4 + 4 + images.nbytes + weight.nbytes


def test_packed_model_keeps_less_than_half_of_what_the_baseline_keeps() -> None:
    model = fcmae.create_model("tiny", depths=[1, 1, 2, 1])
    images = torch.randn(1, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    mask = model.masking(images)

    def saved(variant: fcmae.FCMAE) -> int:
        variant = variant.to(memory_format=torch.channels_last)
        return saved_activations(lambda: variant(images, mask).loss, exclude=[images, *variant.parameters()])

    assert saved(model) < 0.5 * saved(as_dense(model))


def test_steps_take_turns() -> None:
    calls: list[str] = []
    done: list[str] = []
    steps = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    ticks = iter(range(100))

    def clock(step: Callable[[], object]) -> float:
        step()
        return float(next(ticks))

    times = measure_times(steps, clock, repeats=3, warmup=2, progress=done.append)
    assert calls == done == ["a", "b"] * 5
    assert times == {"a": Times((4, 6, 8)), "b": Times((5, 7, 9))}


def test_median_and_quartiles() -> None:
    times = Times((5.0, 1.0, 2.0, 4.0, 3.0))
    assert times.median == 3
    assert times.quartiles == (2, 4)
    assert Times((7.0,)).quartiles == (7, 7)


@pytest.mark.parametrize("clock", [process_clock, wall_clock])
def test_clocks_run_the_step_once(clock: Callable[[Callable[[], object]], float]) -> None:
    calls: list[int] = []
    assert clock(lambda: calls.append(1)) >= 0
    assert calls == [1]


def test_disagreeing_variants_are_not_measured() -> None:
    variants = build_variants(fcmae.create_model(**MICRO))
    images = torch.randn(2, 3, 96, 96)
    mask = variants["packed"].masking(images)
    check_agreement(variants, images, mask, seed=0)
    with torch.no_grad():
        variants["packed"].encoder.net.stages[3].blocks[0].mlp.grn.bias += 0.5
    with pytest.raises(RuntimeError, match="packed does not compute what dense computes"):
        check_agreement(variants, images, mask, seed=0)
    check_agreement({name: variants[name] for name in ("same kernels", "packed")}, images, mask, seed=0)


def test_without_an_optimiser_a_step_changes_nothing() -> None:
    model = fcmae.create_model(**MICRO)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(2, 3, 96, 96)
    masks = [model.masking(images)]
    training_step(model, None, images, masks, "32")()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    training_step(model, build_optimizer(model), images, masks, "32")()
    after = model.state_dict()
    assert not any(torch.equal(after[name], before[name]) for name in after if name.endswith("fc1.weight"))


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_compiled(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[fcmae.FCMAE] = []
    monkeypatch.setattr("fcmae.benchmark.step.compile_parts", done.append)
    variants = build_variants(fcmae.create_model(**MICRO), baselines=tuple(BASELINES))
    conditions = Conditions(batch_size=1, image_size=(96, 96), repeats=1, warmup=0, compile=compiled)
    measured = measure_training(variants, conditions)
    assert list(measured) == list(variants)
    expected = ["dense compiled", *(["same kernels", "packed"] if compiled else [])]
    assert done == [variants[name] for name in expected]


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_arithmetic_equals_a_count_by_hand(recompute: str) -> None:
    with torch.device("meta"):
        variants = build_variants(
            fcmae.create_model(**MICRO, grad_checkpointing=recompute), engines=[get_engine("torch"), get_engine("auto")]
        )
    images = torch.empty(2, 3, 96, 96, device="meta")
    counted = {name: flop_per_step(variant, images) for name, variant in variants.items()}

    def by_hand(seen: int, predicted: int) -> int:
        """Of one image: two per multiply-add, forward and twice as much backward, but for the images' own gradient."""
        stem = seen * 64 * (4 * 4 * 3) * 8
        rest = 3 * 64 * 16 + 9 * (49 * 16 + 16 * 64) + predicted * (64 * 16 + 16 * 32 * 32 * 3)  # the decoder
        for depth, channels, positions in ((1, 8, 64), (1, 16, 16), (2, 32, 4), (1, 64, 1)):
            rest += seen * positions * depth * (49 * channels + 2 * channels * 4 * channels)
        for channels, positions in ((8, 16), (16, 4), (32, 1)):  # downsampling
            rest += seen * positions * (2 * 2 * channels) * (2 * channels)
        return 2 * (2 * stem + 3 * rest)

    assert counted == {
        "dense": 2 * by_hand(seen=9, predicted=9),
        "same kernels": 2 * by_hand(seen=9, predicted=6),
        "torch": 2 * by_hand(seen=3, predicted=6),
        "auto": 2 * by_hand(seen=3, predicted=6),
    }


def test_the_matmul_peak_is_the_best_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([4.0, 2.0, *[8.0] * 6])
    monkeypatch.setattr("fcmae.benchmark.arithmetic.torch.mm", lambda a, b, out: None)
    conditions = Conditions(batch_size=1, image_size=(96, 96))
    monkeypatch.setattr(Conditions, "run", lambda self, step: next(times))
    assert matmul_peak(conditions) == 2 * 1024**3 / 2.0


def _wrong(*arguments: Any, **others: Any) -> Tensor:
    return torch_engine().depthwise(*arguments, **others) * 1.01


def _crash(*arguments: Any, **others: Any) -> Tensor:
    raise RuntimeError("no such instruction\nand more")


@pytest.mark.parametrize(
    ("depthwise", "reason"),
    [
        (_wrong, "'torch' is wrong in float32: depthwise: .* at most 1e-04"),
        (_crash, "fails on cpu: .*no such instruction$"),
    ],
)
def test_the_doctor_finds_engines_that_are_wrong_or_fail(
    depthwise: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine(name: str) -> Engine:
        return replace(torch_engine(), depthwise=depthwise) if name == "torch" else get_engine("torch")

    monkeypatch.setattr(doctor, "get_engine", engine)
    with pytest.raises(fcmae.UserError, match=reason):
        doctor.choose_engines(["auto", "torch"], "cpu", [torch.float32])
    findings = {finding.name: finding for finding in doctor.choose_engines("all", "cpu", [torch.float32])}
    assert findings["torch"].engine is None
    assert findings["cpu"].engine is not None
    assert findings["cpu"].reason is None
    assert "auto" not in findings


def test_half_the_batch_where_memory_does_not_suffice() -> None:
    tried: list[int] = []
    said: list[str] = []

    def run(batch_size: int) -> str:
        tried.append(batch_size)
        if batch_size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    assert within_memory(run, 13, halve=True, say=said.append) == "done"
    assert tried == [13, 6, 3]
    assert said == ["out of memory with batch_size=13: trying 6", "out of memory with batch_size=6: trying 3"]
    with pytest.raises(fcmae.UserError, match="out of memory with batch_size=13: use a smaller batch_size, halve=true"):
        within_memory(run, 13, halve=False, say=said.append)


def test_other_errors_and_the_last_image_end_the_run() -> None:
    def run(batch_size: int) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory" if batch_size else "another error")

    with pytest.raises(fcmae.UserError, match="out of memory with batch_size=1: use fewer baselines"):
        within_memory(run, 2, halve=True, say=lambda text: None)
    with pytest.raises(RuntimeError, match="another error"):
        within_memory(run, 0, halve=True, say=lambda text: None)


def test_measuring_leaves_threads_and_random_numbers_alone() -> None:
    variants = build_variants(fcmae.create_model(**MICRO))
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(threads + 1)
    measure_training(variants, Conditions(batch_size=1, image_size=(96, 96), threads=threads, repeats=1, warmup=0))
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_clock_follows_device_and_threads() -> None:
    assert Conditions(batch_size=1, image_size=(96, 96), threads=1).clock == "process"
    assert Conditions(batch_size=1, image_size=(96, 96), threads=2).clock == "wall"
    assert Conditions(batch_size=1, image_size=(96, 96), threads=2, clock="process").clock == "process"


def test_the_peak_of_a_step_on_the_cpu() -> None:
    megabyte = 1 << 20

    def step() -> None:
        torch.ones(200 * megabyte, dtype=torch.uint8)

    peak = cpu_peak(step)
    if peak is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert 190 * megabyte < peak < 300 * megabyte
