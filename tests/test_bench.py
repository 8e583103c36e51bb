"""`python -m fcmae.bench`: what it prints, writes and refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image

import fcmae
from fcmae.bench import bench
from fcmae.benchmark import doctor, summary
from fcmae.command_line.launch import config_folder
from fcmae.engines import Engine, get_engine

ROOT = Path(__file__).parents[1]
MICRO = ["model.depths=[1,1,2,1]", "model.dims=[8,16,32,64]", "model.decoder_dim=16"]
QUICK = ["batch_size=2", "repeats=3", "warmup=1", "model.engine=torch"]


def compose(*overrides: str) -> DictConfig:
    """configs/bench.yaml with a model that takes no time."""
    size = [] if any(override.startswith("data=") for override in overrides) else ["model.image_size=96"]
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose("bench", ["+model=custom", *MICRO, *size, *QUICK, *overrides])


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def _two_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has, `torch` and `cpu` work (both are `torch`), and the others are missing."""

    def engine(name: str) -> Engine:
        if name not in ("torch", "cpu"):
            raise fcmae.UserError(f"engine={name!r} is missing here")
        found = get_engine("torch")
        return Engine(name, found.depthwise, found.gelu_grn_linear)

    monkeypatch.setattr(doctor, "get_engine", engine)
    monkeypatch.setattr("fcmae.engines.get_engine", engine)


def lines_of(shown: str, name: str) -> list[list[str]]:
    """The cells behind `name` in each table that has such a row."""
    rows = (line.strip() for line in shown.splitlines())
    return [row.removeprefix(name).split() for row in rows if row.startswith(f"{name} ")]


def report_of(capsys: pytest.CaptureFixture[str], path: Path, *overrides: str) -> tuple[dict[str, Any], str]:
    bench(compose(f"json={path}", *overrides))
    return json.loads(path.read_text()), capsys.readouterr().out


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("precision", [32, "bf16"])
def test_it_prints_and_writes_the_same(
    precision: int | str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, shown = report_of(capsys, tmp_path / "out.json", f"precision={precision}")

    assert list(tmp_path.iterdir()) == [tmp_path / "out.json"]
    assert list(report["variants"]) == ["dense", "same kernels", "packed"]
    assert report["baselines"] == ["dense", "same kernels"]
    assert report["variants"]["dense"]["ratios"]["dense"]["time"] == 1
    assert report["conditions"]["clock"] == "process"
    assert report["engines"] == {}
    for name, row in report["variants"].items():
        low, high = row["quartiles_ms"]
        assert len(row["seconds"]) == 3
        assert sorted(row["seconds"])[1] * 1e3 == row["median_ms"]
        ratios = {
            kind: [f"{ratio[kind]:.3f}" for ratio in row["ratios"].values() if ratio[kind]]
            for kind in ("time", "saved", "peak")
        }
        expected = [
            [
                f"{row['median_ms']:.1f}",
                f"{(high - low) / row['median_ms']:.1%}",
                *ratios["time"],
                f"{row['images_per_second']:.2f}",
            ],
            [f"{row['saved_bytes'] / 1e6:.1f}", *ratios["saved"]],
            *([] if row["peak_bytes"] is None else [[f"{row['peak_bytes'] / 1e6:.1f}", *ratios["peak"]]]),
            [f"{row['gflop_per_image']:.3g}", f"{row['tflops']:.3g}", f"{row['of_matmul_peak']:.1%}"],
        ]
        assert lines_of(shown, name) == expected
    for text in (
        torch.__version__,
        f"precision {precision}",
        "1 thread",
        "batch 2",
        "96x96 px",
        "3 of 9 patches visible",
        "same kernels on engine torch",
        "CPU time",
        "optimiser",
        f"matmul peak {report['matmul_peak_tflops']:.3g} TFLOP/s",
    ):
        assert text in shown
    assert max(map(len, (line.rstrip() for line in shown.splitlines()))) <= 120


@pytest.mark.usefixtures("wide", "_two_engines")
def test_all_engines_that_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    report, shown = report_of(capsys, path, "engines=all", "baselines=[same kernels]", "optimizer=false")
    assert list(report["variants"]) == ["same kernels", "cpu", "torch"]
    assert list(report["engines"]) == ["cpu", "torch", "triton", "minkowski"]
    for name in ("triton", "minkowski"):
        reason = f"engine={name!r} is missing here"
        assert report["engines"][name] == {"largest_errors": {}, "reason": reason}
        assert f"{name} is left out: {reason}" in shown.splitlines()
        assert lines_of(shown, name)[-1] == ["left", "out"]
    error = report["engines"]["cpu"]["largest_errors"]["float32"]
    assert 0 < error < 1e-5
    assert lines_of(shown, "cpu")[0] == [f"{error:.1e}", "ok"]
    assert "same kernels on engine cpu" in shown
    assert "optimiser" not in shown
    torch_row, cpu_row = report["variants"]["torch"], report["variants"]["cpu"]
    assert torch_row["gflop_per_image"] == cpu_row["gflop_per_image"]


@pytest.mark.usefixtures("_two_engines")
def test_no_engine_is_an_error() -> None:
    with pytest.raises(fcmae.UserError, match="engine='minkowski' is missing here"):
        bench(compose("engines=[torch,minkowski]"))


def test_one_engine_and_no_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    bench(compose("engines=torch", "baselines=[]", "repeats=1", "warmup=0"))
    shown = capsys.readouterr().out
    assert len(lines_of(shown, "torch")[1]) == 3
    assert not lines_of(shown, "dense")


def test_runs_collect_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    for seed in (1, 2):
        bench(compose(f"json={path}", "repeats=1", "warmup=0", "baselines=[]", f"seed={seed}"))
    assert [json.loads(line)["conditions"]["seed"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.png"
    bench(compose(f"plot={path}", "repeats=2"))
    with Image.open(path) as picture:
        width, height = picture.size
        assert width > height > 300
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}  # type: ignore[union-attr]
    assert {(0xA0, 0xAE, 0xC0), (0x31, 0x82, 0xCE)} <= colours  # bars of baselines and of ours


def test_matplotlib_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "fcmae.benchmark.plot", raising=False)
    with pytest.raises(fcmae.UserError, match=r"plot=... needs matplotlib: pip install 'fcmae\[bench\]'"):
        bench(compose("plot=out.png"))


def test_the_loader_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # More batches of 500 than the two of an epoch.
    report, shown = report_of(
        capsys, tmp_path / "out.json", "what=loader", "data=digits", "batch_size=500", "repeats=3"
    )
    loader = report["loader"]
    assert "variants" not in report
    assert (loader["workers"], loader["batch_size"], len(loader["seconds"])) == (0, 500, 3)
    assert loader["images_per_second"] == pytest.approx(1500 / sum(loader["seconds"]))
    rate = f"{loader['images_per_second']:.1f}"
    assert lines_of(shown, "batches of 500") == [[rate, "0", rate]]


@pytest.mark.usefixtures("_two_engines", "wide")
def test_training_as_a_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "what=training", "data=digits", "data.num_workers=1", "engines=all", "repeats=2"
    report, shown = report_of(capsys, tmp_path / "out.json", *options)
    loader = report["loader"]
    assert loader["workers"] == 1
    assert loader["per_core"] == loader["images_per_second"]
    assert list(report["training"]) == ["cpu", "torch"]
    for name, row in report["training"].items():
        assert len(row["seconds"]) == len(row["waited"]) == 2
        assert row["images_per_second"] == pytest.approx(4 / sum(row["seconds"]))
        assert row["waiting"] == pytest.approx(sum(row["waited"]) / sum(row["seconds"]))
        assert 0 < row["waiting"] < 1
        assert row["loader_per_step"] == pytest.approx(loader["images_per_second"] / row["step_images_per_second"])
        rates = f"{row['step_images_per_second']:.1f}", f"{row['loader_per_step']:.2f}"
        assert lines_of(shown, name)[-1] == [f"{row['images_per_second']:.1f}", f"{row['waiting']:.1%}", *rates]


def test_sizes_follow_the_data() -> None:
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = hydra.compose("bench", ["+model=atto", "data=folder", "data.path=x", "data.image_size=64"])
    assert (config.model.image_size, config.batch_size) == (64, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("batch_size=0", "batch_size=0 .* use 1 or more"),
        ("batch_size=many", "batch_size='many' .* use 1 or more"),
        ("repeats=0", "repeats=0 .* use 1 or more"),
        ("precision=16", "precision='16' is unknown: use 32 or bf16"),
        ("device=tpu", "device='tpu' is unknown: use cpu, cuda"),
        ("device=meta", "device='meta' is unknown: use cpu, cuda"),
        ("device=cuda:99", "device='cuda:99' was asked for, but torch sees .* use another, or cpu"),
        ("clock=cuda", "clock='cuda' does not measure device='cpu': use process or wall"),
        ("clock=sundial", "clock='sundial'"),
        ("json=no/such/folder/out.json", "json=.* cannot be written: name a file in a folder"),
        ("json=.", "json=. cannot be written: name a file"),
        ("plot=no/such/folder/out.png", "plot=.* cannot be written: name a file in a folder"),
        ("plot=out.gif", "plot=out.gif is no picture: use a name ending in .png"),
        ("what=everything", "what='everything' is unknown: use step or loader or training"),
        ("what=loader", "what=loader needs images: add data=digits, or data=folder data.path=DIR"),
        ("what=loader data=digits plot=out.png", "plot=out.png shows steps, not what=loader"),
        ("what=training data=digits model.image_size=64", "model.image_size=64 differs from data.image_size=96"),
        ("what=loader data=digits batch_size=5000", "1438 training images are fewer than one effective batch of 5000"),
        ("baselines=[sparse]", "must be a list of dense, dense compiled, same kernels, or \\[\\] for none"),
        ("engines=fast", "engine='fast' is unknown"),
        ("engines=[]", "must be one engine, a list of them, or all"),
        ("optimizer=sgd", "optimizer='sgd' is unknown: use true or false"),
        ("compile=1", "compile=1 is unknown: use true or false"),
        ("halve=perhaps", "halve='perhaps' is unknown: use True or False"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(options: str, message: str) -> None:
    with pytest.raises(fcmae.UserError, match=message):
        bench(compose(*options.split()))


def test_too_little_memory_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr("fcmae.bench.run_steps", fail)
    with pytest.raises(fcmae.UserError, match=r"^out of memory with batch_size=2: use a smaller batch_size"):
        bench(compose())


def test_the_summary_holds_figures_against_the_bars(tmp_path: Path) -> None:
    def variant(milliseconds: float, **ratios: dict[str, float]) -> dict[str, Any]:
        return {"median_ms": milliseconds, "of_matmul_peak": 0.4, "ratios": ratios}

    shares = {"dense compiled": {"time": 0.4, "peak": 0.41}, "same kernels": {"time": 0.5, "peak": 0.5}}
    variants = {"dense compiled": variant(50), "triton": variant(20, **shares), "torch": variant(30, **shares)}
    reports = [
        {
            "machine": {"device": "a GPU", "driver": "1.2"},
            "model": {"size": size},
            "conditions": {"batch_size": batch, "precision": "bf16", "compile": False},
            "baselines": ["dense compiled", "same kernels"],
            "variants": variants,
        }
        for size, batch in (("tiny", 256), ("huge", 64))
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(report) + "\n" for report in reports))
    (tmp_path / "tests.txt").write_text("$ pytest\n\n3 passed in 1s\n")
    assert summary.main([str(tmp_path), "tests=0", "tiny=0", "tiny compiled=none"]) == 0
    page = (tmp_path / "summary.md").read_text()
    assert "device a GPU, driver 1.2" in page
    assert "Tests: 3 passed in 1s" in page
    assert (
        "| tiny | 256 | triton, bf16 | 20.0 | 40.0% |  | 0.400 met | 0.500 **missed** |  | 0.410 **missed** |" in page
    )
    assert "| tiny | 256 | torch, bf16 | 30.0 | 40.0% |  | 0.400 | 0.500 |  | 0.410 |" in page
    assert "| huge | 64 | triton, bf16 | 20.0 | 40.0% |  | 0.400 | 0.500 |  | 0.410 |" in page
    assert "| tiny compiled | left out: no time |" in page
    for failed, text in (("124", "took too long"), ("1", "failed with status 1")):
        assert summary.main([str(tmp_path), "tests=0", f"tiny={failed}"]) == 1
        assert f"| tiny | {text} |" in (tmp_path / "summary.md").read_text()


@pytest.mark.slow
def test_the_gpu_check_runs_through_on_a_cpu(tmp_path: Path) -> None:
    environment = os.environ | {"FCMAE_CHECK_DEVICE": "cpu", "PYTHON": sys.executable}
    done = subprocess.run(
        [ROOT / "scripts/gpu_check.sh", tmp_path / "out"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"tests.txt", "bench.txt", "results.jsonl", "summary.md", "tiny.png", "base.png", "huge.png"}
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 5
