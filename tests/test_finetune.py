"""Fine-tuning: what it starts from, the rates of its steps, its moving average, its modes, and what it refuses."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from micro import command, content, pretrain
from PIL import Image
from safetensors.torch import load_file
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from fcmae.models.convnext import create_convnext
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
        "import sys; from fcmae.command_line.launch import run; from fcmae import finetune, evaluate, predict, embed; "
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
    (place / "images/val/dog/01.png").write_text("no image")
    options = ["trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=2", "trainer.log_every_n_steps=1"]
    options += ["ema.decay=0.9"]
    typed = [sys.executable, "-m", "fcmae.finetune", *MICRO, "checkpoint=null", *options, "optim.base_lr=0.02"]
    result = subprocess.run(typed, cwd=place, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (place / RUN / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    wanted = [closed_form(step, peak=0.02 * 4 / 256, floor=1e-6, warmup=5, steps=15) for step in range(15)]
    assert rates == pytest.approx(wanted, rel=1e-6)
    # The numbers of validation are those of all ranks together: 8 images, one of them unreadable.
    evaluated = command("evaluate", place, f"checkpoint={RUN}", "data.path=images", "device=cpu", "out=evaluated")
    assert evaluated.code == 0, evaluated.err
    metrics = json.loads((place / "evaluated/metrics.json").read_text())
    summary = json.loads((place / RUN / "summary.json").read_text())
    assert metrics["images"] == 7
    assert summary["val_ema_acc1"] == pytest.approx(metrics["acc1"], abs=1e-6)
    assert summary["val_ema_loss"] == pytest.approx(metrics["loss"], rel=1e-4)


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


# -- what it starts from --


def saved_network(file: Path, *, classes: int = 0, **options: Any) -> Path:
    """A state dict in timm's names, as people have them lying around."""
    net = create_convnext(
        "custom", **{"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64], "in_chans": 3, "num_classes": classes, **options}
    )
    torch.save(net.state_dict(), file)
    return file


def test_the_weights_of_the_checkpoint_are_what_training_starts_with(place: Path) -> None:
    file = saved_network(place / "net.pth", classes=5)
    options = ["save.every_n_steps=1", "save.keep=100", "ema.decay=0.5"]
    finetune(place, *options, checkpoint="net.pth")
    told = (place / RUN / "train.log").read_text()
    assert "encoder: " in told
    assert "classifier: new, 2 classes (the checkpoint's has 5)" in told
    # A warm-up starts at rate 0, so the first step changes nothing.
    first = min((place / RUN / "checkpoints").glob("epoch=*.ckpt"))
    now, given = torch.load(first, weights_only=True)["state_dict"], torch.load(file, weights_only=True)
    body = [name for name in given if not name.startswith("head.fc")]
    assert all(torch.equal(now[f"net.{name}"], given[name]) for name in body)
    assert not torch.equal(now["net.stem.0.weight"], state(place / RUN)["net.stem.0.weight"])


def test_a_pre_training_run_is_what_training_starts_with(place: Path) -> None:
    options = ["data.path=images", "data=folder", "data.image_size=64", "data.num_workers=0", "data.batch_size=8"]
    options += ["epochs=1", "optim.warmup_epochs=0", "trainer=cpu", "pictures=0", "model.decoder_dim=16", "run_name=p"]
    result = pretrain(place, *SIZE, *options)
    assert result.code == 0, result.err
    finetune(place, "save.every_n_steps=1", "save.keep=100", checkpoint="outputs/pretrain/p")
    first = min((place / RUN / "checkpoints").glob("epoch=*.ckpt"))
    now = torch.load(first, weights_only=True)["state_dict"]
    given = load_file(place / "outputs/pretrain/p/exported/encoder.safetensors")
    assert all(torch.equal(now[f"net.{name}"], value) for name, value in given.items())


@pytest.mark.parametrize("same", [True, False])
def test_a_classifier_is_kept_if_its_classes_are_the_same(place: Path, same: bool) -> None:
    finetune(place)
    shutil.move(place / RUN, place / "before")
    if not same:  # as many, but others
        for part in ("train", "val"):
            (place / f"images/{part}/dog").rename(place / f"images/{part}/wolf")
    finetune(place, "save.every_n_steps=1", "save.keep=100", checkpoint="before")
    told = (place / RUN / "train.log").read_text()
    assert ("classifier: 2 classes, from the checkpoint" in told) == same
    first = min((place / RUN / "checkpoints").glob("epoch=*.ckpt"))
    now, before = torch.load(first, weights_only=True)["state_dict"], state(place / "before")
    assert torch.equal(now["net.head.fc.weight"], before["net.head.fc.weight"]) == same


def test_channels_are_adapted_when_asked_only(place: Path) -> None:
    saved_network(place / "net.pth")
    grey = ["data.in_chans=1", "data.mean=[0.5]", "data.std=[0.25]"]
    message = refused(place, *grey, checkpoint="net.pth")
    wanted = "net.pth is for images of 3 channels, the model takes 1: use data.in_chans=3, or adapt_in_chans=sum or"
    assert message.startswith(wanted)
    finetune(place, *grey, "adapt_in_chans=sum", checkpoint="net.pth")
    assert "first convolution: adapted from 3 channels to 1" in (place / RUN / "train.log").read_text()


# -- unequal classes, several labels --


def test_balanced_class_weights_are_those_of_scikit_learn(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(ClassificationModule, "on_fit_start", lambda self: seen.append(self.criterion.class_weights))
    finetune(place, "class_weights=balanced")
    assert seen[0].tolist() == pytest.approx(
        compute_class_weight("balanced", classes=np.arange(2), y=[0] * 12 + [1] * 8)
    )


def test_several_labels_per_image(place: Path) -> None:
    files = sorted(file.relative_to(place / "images") for file in (place / "images/train").rglob("*.png"))
    rows = [f"{file},{'red;warm' if 'cat' in str(file) else 'green'}" for file in files]
    (place / "labels.csv").write_text("image,label\n" + "\n".join(rows) + "\n")
    options = [
        "data=table",
        "data.table=labels.csv",
        "data.multi_label=true",
        "batch_augment=none",
        "label_smoothing=0",
    ]
    options += ["augment.randaugment=null", "optim.base_lr=0.3", "epochs=8", "model.head_init_scale=1"]
    summary = finetune(place, *options, "class_weights=balanced")
    assert summary["val_map"] == 1.0
    message = command("finetune", place, *MICRO, "checkpoint=null", *options, "run_name=y", "label_smoothing=0.1").error
    assert message.startswith("label_smoothing=0.1 needs one label per image")


# -- what it refuses --

REFUSED = {
    "mode=half": "mode='half' is unknown: use full or linear or head_then_full",
    "mode=head_then_full": "optim.head_epochs=0 must be above 0 and below epochs=3 with mode=head_then_full",
    "optim.head_epochs=1": "optim.head_epochs=1 needs mode=head_then_full, mode is full",
    "optim.layer_decay=0": r"optim.layer_decay=0 must be a number in \(0, 1\]",
    "optim.layer_decay_kind=group": "layer_decay_kind=group is 12 groups of 3 blocks, .*: use .*=single",
    "optim.layer_decay_kind=pair": "optim.layer_decay_kind='pair' is unknown: use 'single' or 'group'",
    "class_weights=some": "class_weights='some' is unknown: use none or balanced",
    "label_smoothing=1": r"label_smoothing=1 must be a share in \[0, 1\)",
    "ema.decay=1": r"ema.decay=1 must be a share in \[0, 1\), such as 0.9999, or null for no average",
    "data.batch_size=5": "data.batch_size=5 is odd, and mixup and cutmix pair images: make it even, or set .*",
    "effective_batch=6": "effective_batch=6 is not a multiple of 4 = data.batch_size=4 x .*: change one of them",
    "effective_batch=24": "20 training images are fewer than one effective batch of 24: use .*=20 or less.*",
    "data.shots=9": "class 'dog' has 8 images to learn from, not data.shots=9 images: add some, .*, or ask for fewer",
    "data.fraction=0": r"data.fraction=0 must be a share in \(0, 1\]",
    "data.sampling=fair": "data.sampling='fair' is unknown: use 'uniform' or 'balanced'",
    "augment.randaugment=9": "augment.randaugment=9 must be text",
    "augment.randaugment=much": "augment.randaugment=much is no policy: write it as rand-m9-mstd0.5-inc1",
    "augment.crop_pct=2": r"augment.crop_pct=2 must be a share in \(0, 1\], auto or warp",
    "batch_augment.mixup=-1": "batch_augment.mixup=-1 must be a number from 0",
    "data=folder": "data=folder has no labels: use data=imagefolder .*",
    "data.path=nowhere": "nowhere does not exist: name a folder of images",
    "checkpoint=nowhere": "nowhere does not exist: give a run's folder, a checkpoint, an export or a state dict",
    "checkpoint=wide.pth": r"wide.pth holds a ConvNeXt V2 custom \(depths .*, dims \[16, 16, 32, 64\]\), .*",
    "checkpoint=images/train/cat/00.png": "images/train/cat/00.png .*",
    "adapt_in_chans=mean": "adapt_in_chans='mean' is unknown: use sum or repeat, or null to refuse",
    "model.num_classes=3": "Could not override 'model.num_classes'.*|model.num_classes is not an option.*",
}


@pytest.mark.parametrize("option", REFUSED)
def test_bad_input(place: Path, option: str) -> None:
    saved_network(place / "wide.pth", dims=[16, 16, 32, 64])
    saved_network(place / "net.pth")
    checkpoint = option.removeprefix("checkpoint=") if option.startswith("checkpoint=") else "net.pth"
    message = refused(place, *([] if option.startswith("checkpoint=") else [option]), checkpoint=checkpoint)
    assert re.fullmatch(REFUSED[option], message), message


def test_an_empty_class_is_named(place: Path) -> None:
    (place / "images/train/bird").mkdir()
    assert refused(place) == "images/train/bird holds no image: add some, or remove the folder"


def test_a_checkpoint_has_to_be_named(place: Path) -> None:
    arguments = [option for option in MICRO if not option.startswith("checkpoint")]
    message = command("finetune", place, *arguments).only_error
    assert message == "checkpoint is not given: add checkpoint=VALUE"


def test_a_broken_image_is_skipped_and_named(place: Path) -> None:
    broken = [place / "images/train/cat/00.png", place / "images/val/dog/00.png"]
    for file in broken:
        file.write_text("no image")
    finetune(place, "data.max_broken=0.5")
    named = {json.loads(line)["id"] for line in (place / RUN / "skipped.jsonl").read_text().splitlines()}
    assert named == {"train/cat/00.png", "val/dog/00.png"}
    assert re.search(r"val_acc1", (place / RUN / "summary.json").read_text())


def test_a_frozen_network_is_in_evaluation_mode(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no drop path, in the first step and after a validation."""
    modes: list[bool] = []
    loss = ClassificationModule.loss

    def watched(self: ClassificationModule, batch: Any) -> Tensor:
        modes.append(any(module.training for module in self.net.modules()))
        return loss(self, batch)

    monkeypatch.setattr(ClassificationModule, "loss", watched)
    finetune(place, "mode=linear", "model.drop_path_rate=0.5", "ema.decay=0.9")
    assert modes == [False] * 15
    modes.clear()
    finetune(place, "run_name=y", "run_dir=outputs/finetune/x", "resume=never", "model.drop_path_rate=0.5")
    assert modes == [True] * 15


def test_another_checkpoint_is_another_run(place: Path) -> None:
    for name in ("a.pth", "b.pth"):
        saved_network(place / name)
    finetune(place, checkpoint="a.pth")
    message = command("finetune", place, *MICRO, "checkpoint=b.pth").only_error
    assert message.startswith(f"{RUN} holds a run with another configuration (checkpoint: a.pth -> b.pth)")


def test_going_on_does_not_need_what_it_started_from(place: Path) -> None:
    file = saved_network(place / "net.pth")
    finetune(place, "save.every_n_steps=1", "save.keep=100", checkpoint="net.pth")
    reference = state(place / RUN)
    (place / RUN / "summary.json").unlink()
    (place / RUN / "checkpoints/last.ckpt").unlink()
    for saved in sorted((place / RUN / "checkpoints").glob("epoch=*.ckpt"))[3:]:
        saved.unlink()
    file.unlink()
    finetune(place, "save.every_n_steps=1", "save.keep=100", checkpoint="net.pth")
    assert all(torch.equal(value, reference[name]) for name, value in state(place / RUN).items())


def test_the_last_weights_are_validated(place: Path) -> None:
    every, second = (
        finetune(place, f"trainer.check_val_every_n_epoch={n}", "resume=never", "optim.base_lr=0.1") for n in (1, 2)
    )
    assert second == every


def test_the_best_checkpoint_is_used_with_the_weights_it_was_chosen_by(place: Path) -> None:
    options = ["epochs=6", "optim.base_lr=0.3", "model.head_init_scale=1", "augment.randaugment=null"]
    finetune(place, *options, "ema.decay=0.9999")
    assert (
        "the moving average keeps 100 % of the weights that training starts with"
        in (place / RUN / "train.log").read_text()
    )
    best = torch.load(place / RUN / "checkpoints/best.ckpt", weights_only=True)["fcmae"]["best"]
    assert best["metric"] == "val_acc1"
    arguments = [f"checkpoint={RUN}/checkpoints/best.ckpt", "data.path=images", "num_workers=0", "device=cpu"]
    result = command("evaluate", place, *arguments, "out=evaluated")
    assert result.code == 0, result.err
    assert json.loads((place / "evaluated/metrics.json").read_text())["acc1"] == best["value"]
    assert json.loads((place / "evaluated/about.json").read_text())["weights"].startswith("weights (")
    # The export is the average, and says so.
    for ema, code in (("true", 0), ("null", 0), ("false", 2)):
        arguments[0] = f"checkpoint={RUN}/exported"
        assert command("evaluate", place, *arguments, f"ema={ema}", "out=evaluated").code == code


@pytest.mark.parametrize(
    ("options", "by"),
    [
        ([], "acc1"),
        (["class_weights=balanced"], "balanced_accuracy"),
        (["data.sampling=balanced", "ema.decay=0.5"], "balanced_accuracy"),
    ],
)
def test_where_classes_are_balanced_the_best_is_so_too(place: Path, options: list[str], by: str) -> None:
    (place / "images/val/dog/00.png").write_text("no image")
    rates = [
        "epochs=2",
        "optim.base_lr=0.3",
        "model.head_init_scale=1",
        "augment.randaugment=null",
        "data.max_broken=1",
    ]
    summary = finetune(place, *rates, *options)
    best = torch.load(place / RUN / "checkpoints/best.ckpt", weights_only=True)["fcmae"]["best"]
    assert best["metric"] in {f"val_{by}", f"val_ema_{by}"}
    log = (place / RUN / "train.log").read_text()
    assert ("best.ckpt: the one with the highest balanced accuracy, not top-1" in log) == (by != "acc1")
    accuracy = summary["val_balanced_accuracy"]
    assert f"balanced accuracy {accuracy:.2%}, loss" in log
    arguments = [f"checkpoint={RUN}", "data.path=images", "num_workers=0", "device=cpu", "max_broken=1", "ema=false"]
    result = command("evaluate", place, *arguments, "out=evaluated")
    assert result.code == 0, result.err
    assert json.loads((place / "evaluated/metrics.json").read_text())["balanced_accuracy"] == pytest.approx(accuracy)
    assert re.search(rf"^balanced accuracy +{accuracy:.2%}$", result.out, re.MULTILINE)
    with (place / "evaluated/per_class.csv").open() as file:
        recalls = [float(row["recall"]) for row in csv.DictReader(file)]
    assert accuracy == pytest.approx(sum(recalls) / 2, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["optim.warmup_epochs=4"], "optim.warmup_epochs=4 is longer than the run, epochs=3: make it shorter, .*"),
        (
            ["mode=head_then_full", "optim.head_epochs=2", "optim.warmup_epochs=2"],
            "optim.warmup_epochs=2 after optim.head_epochs=2 is longer than the run, epochs=3: .*",
        ),
        (["model.in_chans=1"], "model.in_chans=1 differs from data.in_chans=3: set data.in_chans, .*"),
        (["ema.decay=abc"], r"ema.decay='abc' must be a share in \[0, 1\), .*"),
        (["masking.mask_ratio=0.5"], "masking.mask_ratio is not an option"),
    ],
)
def test_more_bad_input(place: Path, options: list[str], message: str) -> None:
    found = refused(place, *options)
    assert re.fullmatch(message, found), found
