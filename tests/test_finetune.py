"""Fine-tuning: what it starts from, the rates of its steps, its moving average, its modes, and what it refuses."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from micro import command, content
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fcmae.training.classification import ClassificationModule

SIZE = ["+model=custom", "model.depths=[1,1,1,1]", "model.dims=[8,16,32,64]"]
MICRO = [
    *SIZE,
    "data.path=images",
    "data.image_size=64",
    "data.batch_size=4",
    "data.num_workers=0",
    "optim.warmup_epochs=1",
    "epochs=3",
    "trainer=cpu",
    "run_name=x",
]
RUN = Path("outputs/finetune/x")


def write_classes(folder: Path, counts: dict[str, int]) -> None:
    """A folder per class, of images of a colour of its own with some noise."""
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            noise = torch.randint(0, 80, (40, 48, 3), generator=torch.Generator().manual_seed(100 * number + index))
            noise[..., number % 3] += 150
            Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / name / f"{index:02d}.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images to learn from, 8 to validate with, of two classes."""
    folder = tmp_path_factory.mktemp("finetune")
    write_classes(folder / "images/train", {"cat": 12, "dog": 8})
    write_classes(folder / "images/val", {"cat": 5, "dog": 3})
    return folder


@pytest.fixture
def place(images: Path, tmp_path: Path) -> Path:
    shutil.copytree(images, tmp_path, dirs_exist_ok=True)
    return tmp_path


def finetune(place: Path, *options: str, checkpoint: str = "null") -> dict[str, Any]:
    result = command("finetune", place, *MICRO, f"checkpoint={checkpoint}", *options)
    assert result.code == 0, result.err
    summary: dict[str, Any] = json.loads((place / RUN / "summary.json").read_text())
    return summary


def refused(place: Path, *options: str, checkpoint: str = "null") -> str:
    """The one line that is said; nothing may be left behind."""
    before = content(place)
    message = command("finetune", place, *MICRO, f"checkpoint={checkpoint}", *options).only_error
    assert content(place) == before
    return message


def state(run: Path) -> dict[str, Tensor]:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    moments = {
        f"{index}.{name}": value
        for index, entry in checkpoint["optimizer_states"][0]["state"].items()
        for name, value in entry.items()
    }
    return {**checkpoint["state_dict"], **moments}


def test_no_engine_is_imported(place: Path) -> None:
    source = (
        "import sys; from fcmae.launch import run; from fcmae import finetune, evaluate, predict, embed; "
        "run('finetune', finetune.finetune); print(sorted(sys.modules))"
    )
    typed = [sys.executable, "-c", source, *MICRO, "checkpoint=null", "epochs=2"]
    result = subprocess.run(typed, cwd=place, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "'fcmae.models.classifier'" in result.stdout
    for name in ("fcmae.engines", "fcmae.masking", "fcmae.models.encoder", "MinkowskiEngine"):
        assert f"'{name}'" not in result.stdout


def test_it_learns_and_says_so(place: Path) -> None:
    summary = finetune(place, "epochs=6", "optim.base_lr=0.3", "model.head_init_scale=1", "augment.randaugment=null")
    assert summary["val_acc1"] == 1.0
    checkpoint = torch.load(place / RUN / "checkpoints/best.ckpt", weights_only=True)
    assert checkpoint["fcmae"]["best"]["metric"] == "val_acc1"
    assert checkpoint["fcmae"]["class_names"] == ["cat", "dog"]
    exported = load_file(place / RUN / "exported/model.safetensors")
    last = torch.load(place / RUN / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert {f"net.{name}" for name in exported} == last.keys()
    assert all(torch.equal(value, last[f"net.{name}"]) for name, value in exported.items())


# -- the rate of every step --


class Watch(L.Callback):
    def __init__(self) -> None:
        self.rates: list[dict[tuple[bool, float], float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.rates.append({(g["is_head"], g["lr_scale"]): g["lr"] for g in optimizer.param_groups})


def closed_form(step: float, *, peak: float, floor: float, warmup: float, steps: float) -> float:
    """The authors' schedule: linear from 0, then half a cosine to the floor (original code, utils.py)."""
    if step < warmup:
        return peak * step / warmup
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@pytest.mark.parametrize("head_epochs", [0, 1])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_rate_of_every_step(
    place: Path, accumulate: int, head_epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, configure = Watch(), ClassificationModule.configure_callbacks
    monkeypatch.setattr(ClassificationModule, "configure_callbacks", lambda self: [*configure(self), watch])
    options = [f"effective_batch={4 * accumulate}", "optim.base_lr=0.02", "optim.layer_decay=0.8", "epochs=4"]
    mode = ["mode=head_then_full", f"optim.head_epochs={head_epochs}"] if head_epochs else []
    finetune(place, *options, *mode)
    per_epoch = 20 // (4 * accumulate)
    peak, steps = 0.02 * 4 * accumulate / 256, 4 * per_epoch
    assert len(watch.rates) == steps
    assert sorted({scale for _, scale in watch.rates[0]}) == pytest.approx(
        [0.8**distance for distance in range(4, -1, -1)]
    )
    for step, rates in enumerate(watch.rates):
        for (is_head, scale), rate in rates.items():
            begin = 0 if is_head else head_epochs * per_epoch
            wanted = closed_form(step - begin, peak=peak, floor=1e-6, warmup=per_epoch, steps=steps - begin)
            assert rate == pytest.approx(scale * wanted if step >= begin else 0.0, rel=1e-12), (step, is_head, scale)


@pytest.mark.slow
def test_the_rate_of_every_step_of_two_ranks(place: Path) -> None:
    options = ["trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=2", "trainer.log_every_n_steps=1"]
    typed = [sys.executable, "-m", "fcmae.finetune", *MICRO, "checkpoint=null", *options, "optim.base_lr=0.02"]
    result = subprocess.run(typed, cwd=place, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (place / RUN / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    wanted = [closed_form(step, peak=0.02 * 4 / 256, floor=1e-6, warmup=5, steps=15) for step in range(15)]
    assert rates == pytest.approx(wanted, rel=1e-6)


# -- going on --


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_after_any_step_changes_nothing(place: Path, accumulate: int) -> None:
    """Mixed, erased and augmented batches, drop path and the moving average included."""
    options = ["save.every_n_steps=1", "save.keep=100", "ema.decay=0.9", "ema.warmup=true", "model.head_init_scale=1"]
    options += [f"trainer.accumulate_grad_batches={accumulate}", "batch_augment.random_erasing=0.5"]
    finished = finetune(place, *options)
    reference = state(place / RUN)
    assert any(name.startswith("ema.module.") for name in reference)
    shutil.move(place / RUN, place / "reference")
    files = sorted((place / "reference/checkpoints").glob("epoch=*.ckpt"))
    assert len(files) == 15 // accumulate - (accumulate == 2)  # 5 batches make 2 steps
    for step in range(1, len(files)):
        shutil.copytree(place / "reference", place / RUN)
        for name in ("summary.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt"):
            (place / RUN / name).unlink()
        for file in files[step:]:
            (place / RUN / "checkpoints" / file.name).unlink()
        assert finetune(place, *options) == finished
        resumed = state(place / RUN)
        assert resumed.keys() == reference.keys()
        assert all(torch.equal(resumed[name], reference[name]) for name in reference), step
        shutil.rmtree(place / RUN)


@pytest.mark.parametrize("warmup", ["false", "true"])
def test_the_moving_average_follows_its_formula(place: Path, warmup: str) -> None:
    finetune(place, "save.every_n_steps=1", "save.keep=100", "ema.decay=0.7", f"ema.warmup={warmup}", "epochs=2")
    files = sorted((place / RUN / "checkpoints").glob("epoch=*.ckpt"))
    average: dict[str, Tensor] = {}
    for step, file in enumerate(files, start=1):
        saved = torch.load(file, weights_only=True)["state_dict"]
        now = {name.removeprefix("net."): value for name, value in saved.items() if name.startswith("net.")}
        if step == 1 and warmup == "false":  # before the first step the average is what was started from
            average = {name: saved[f"ema.module.{name}"] for name in now}
            continue
        # timm: decay 0 in the first step, then 1 - (1 + t)^(-2/3) up to the one asked for
        decay = 0.7 if warmup == "false" else min(0.7, 1 - step ** (-2 / 3)) if step > 1 else 0.0
        average = {name: decay * average.get(name, now[name]) + (1 - decay) * now[name] for name in now}
        for name, value in average.items():
            assert torch.allclose(saved[f"ema.module.{name}"], value, atol=1e-6), (step, name)


# -- modes --


def test_linear_trains_the_last_layer_alone(place: Path) -> None:
    finetune(place, "mode=linear", "optim.base_lr=1", "save.every_n_steps=1", "save.keep=100")
    files = sorted((place / RUN / "checkpoints").glob("epoch=*.ckpt"))
    first, last = (torch.load(file, weights_only=True)["state_dict"] for file in (files[1], files[-1]))
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed == {"net.head.fc.weight", "net.head.fc.bias"}


def test_the_head_goes_first(place: Path) -> None:
    options = ["mode=head_then_full", "optim.head_epochs=2", "save.every_n_steps=1", "save.keep=100"]
    finetune(place, *options)
    files = sorted((place / RUN / "checkpoints").glob("epoch=*.ckpt"))
    saved = [torch.load(file, weights_only=True)["state_dict"] for file in files]
    body = [name for name in saved[0] if name.startswith("net.st")]
    # The eleventh step is the first of the third epoch, at rate 0 of the body's own warm-up.
    assert all(torch.equal(saved[0][name], saved[10][name]) for name in body)
    assert not torch.equal(saved[1]["net.head.fc.weight"], saved[10]["net.head.fc.weight"])
    assert not torch.equal(saved[10]["net.stem.0.weight"], saved[12]["net.stem.0.weight"])
