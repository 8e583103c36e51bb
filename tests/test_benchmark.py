"""The benchmark compares like with like and reports what it measured. How fast anything is, is not tested."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

import fcmae
from fcmae.bench import bench
from fcmae.benchmark.dense import MaskedDenseEncoder, as_dense
from fcmae.benchmark.measure import Times, cpu_peak, measure_times, process_clock, saved_activations, wall_clock
from fcmae.benchmark.step import Conditions, build_variants, check_agreement, measure_training

MICRO = {"depths": [1, 1, 2, 1], "dims": [8, 16, 32, 64], "decoder_dim": 16, "image_size": 96}


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ("atto", {"depths": [1, 1, 2, 1]}),  # 1x1 convolutions in the MLPs
        ("tiny", {"depths": [1, 1, 2, 1]}),  # linear layers
        ("custom", MICRO | {"patch_size": 64, "image_size": 192, "grn_scope": "batch"}),
        ("custom", MICRO | {"grad_checkpointing": True, "in_chans": 2}),
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


def test_dense_baseline_shares_nothing_with_the_model() -> None:
    model = fcmae.create_model(**MICRO)
    dense = as_dense(model)
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in dense.parameters()}


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


def compose(**options: Any) -> DictConfig:
    """configs/bench.yaml with a model that takes no time."""
    model = {"_target_": "fcmae.create_model", "size": "custom", "engine": "torch", **MICRO}
    folder = Path(__file__).parents[1] / "configs"
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        config = hydra.compose("bench")
    config.model = model
    for name, value in {"batch_size": 2, "repeats": 3, "warmup": 1, **options}.items():
        config[name] = value
    return config


@pytest.mark.parametrize("precision", [32, "bf16"])
def test_entry_point_prints_and_writes_the_same(
    precision: int | str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "out.json"
    bench(compose(precision=precision, json=str(path)))
    shown = capsys.readouterr().out
    report = json.loads(path.read_text())

    assert list(tmp_path.iterdir()) == [path]
    assert list(report["variants"]) == ["dense", "packed"]
    assert report["baseline"] == "dense"
    assert report["variants"]["dense"]["ratio"] == report["variants"]["dense"]["saved_ratio"] == 1
    assert report["conditions"]["clock"] == "process"
    for name, row in report["variants"].items():
        low, high = row["quartiles_ms"]
        assert len(row["seconds"]) == 3
        assert sorted(row["seconds"])[1] * 1e3 == row["median_ms"]
        line = next(line for line in shown.splitlines() if line.split()[:1] == [name])
        assert line.split() == [
            name,
            f"{row['median_ms']:.1f}",
            f"{(high - low) / row['median_ms']:.1%}",
            f"{row['ratio']:.3f}",
            f"{row['images_per_second']:.2f}",
            f"{row['saved_bytes'] / 1e6:.1f}",
            f"{row['saved_ratio']:.3f}",
            *([] if row["peak_bytes"] is None else [f"{row['peak_bytes'] / 1e6:.1f}", f"{row['peak_ratio']:.3f}"]),
        ]
    for text in (
        torch.__version__,
        f"precision {precision}",
        "1 thread",
        "batch 2",
        "96x96 px",
        "3 of 9 patches visible",
        "CPU time",
    ):
        assert text in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 .* use 1 or more"),
        ({"batch_size": "many"}, "batch_size='many' .* use 1 or more"),
        ({"repeats": 0}, "repeats=0 .* use 1 or more"),
        ({"precision": 16}, "precision='16' is unknown: use 32 or bf16"),
        ({"device": "tpu"}, "device='tpu' is unknown: use cpu, cuda"),
        ({"device": "meta"}, "device='meta' is unknown: use cpu, cuda"),
        ({"device": "cuda:99"}, "device='cuda:99' was asked for, but torch sees .* use another, or cpu"),
        ({"clock": "cuda"}, "clock='cuda' does not measure device='cpu': use process or wall"),
        ({"clock": "sundial"}, "clock='sundial'"),
        ({"json": "no/such/folder/out.json"}, "cannot be written: name a file in a folder"),
        ({"json": "."}, "json=. cannot be written: name a file"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fcmae.UserError, match=message):
        bench(compose(**options))


def test_the_peak_of_a_step_on_the_cpu() -> None:
    megabyte = 1 << 20

    def step() -> None:
        torch.ones(200 * megabyte, dtype=torch.uint8)

    peak = cpu_peak(step)
    if peak is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert 190 * megabyte < peak < 300 * megabyte
