"""Evaluate, predict and embed: the module's own numbers, timm's numbers, and clear ends."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from micro import command, content, pretrain
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.data import create_dataset, create_loader
from torch import Tensor, nn

from fcmae.data.picture import Decoded
from fcmae.inference.trained import Trained, load_trained
from fcmae.models.convnext import create_convnext

MODEL = ["+model=custom", "model.depths=[1,1,1,1]", "model.dims=[8,16,32,64]"]
TRAINED = Path("outputs/finetune/x")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with digits as files, a classifier fine-tuned on them a little, and a pre-trained encoder."""
    folder = tmp_path_factory.mktemp("inference")
    digits = load_digits()
    for index in range(400):
        part = "train" if index < 280 else "val"
        file = folder / f"images/{part}/digit {digits.target[index]}/{index:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        side = (30 + index % 23, 30 + index % 17)  # of many shapes
        Image.fromarray((digits.images[index] * 15.9).astype(np.uint8)).resize(side).save(file)
    shared = ["data.path=images", "data.image_size=64", "data.num_workers=0", "trainer=cpu", "run_name=x"]
    options = ["checkpoint=null", "epochs=16", "optim.base_lr=0.05", "optim.warmup_epochs=0", "ema.decay=0.8"]
    options += ["augment.randaugment=null", "augment.flip=false", "batch_augment=none", "model.head_init_scale=1"]
    result = command("finetune", folder, *MODEL, *shared, *options, "data.batch_size=20")
    assert result.code == 0, result.err
    result = pretrain(
        folder,
        *MODEL,
        "model.decoder_dim=16",
        "data=folder",
        *shared,
        "epochs=1",
        "optim.warmup_epochs=0",
        "data.batch_size=32",
        "pictures=0",
    )
    assert result.code == 0, result.err
    return folder


def evaluate(place: Path, *options: str, checkpoint: Path = TRAINED) -> dict[str, float]:
    arguments = [f"checkpoint={checkpoint}", "data.path=images", "num_workers=0", "device=cpu", "out=evaluated"]
    result = command("evaluate", place, *arguments, *options)
    assert result.code == 0, result.err
    metrics: dict[str, float] = json.loads((place / "evaluated/metrics.json").read_text())
    return metrics


def features(place: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """The cached ones: (values, labels) of the images to learn from and of those held out."""
    found = [load_file(file) for file in (place / "evaluated").glob("features-*.safetensors")]
    found.sort(key=lambda stored: -len(stored["labels"]))
    assert [len(stored["labels"]) for stored in found] == [280, 120]
    return [(stored["values"].numpy(), stored["labels"].numpy()) for stored in found]


@pytest.mark.parametrize(("ema", "prefix"), [("null", "val_ema"), ("true", "val_ema"), ("false", "val")])
def test_evaluation_gives_the_numbers_of_validation(place: Path, ema: str, prefix: str) -> None:
    metrics = evaluate(place, f"ema={ema}")
    summary = json.loads((place / TRAINED / "summary.json").read_text())
    assert summary["val_loss"] != summary["val_ema_loss"]  # or the test could not tell them apart
    assert metrics["acc1"] == pytest.approx(summary[f"{prefix}_acc1"], abs=1e-6)
    assert metrics["loss"] == pytest.approx(summary[f"{prefix}_loss"], rel=1e-4)
    assert metrics["images"] == 120


@pytest.mark.parametrize(("size", "crop"), [(64, {"crop_pct": 0.875}), (384, {"crop_pct": 1.0, "crop_mode": "squash"})])
def test_timms_own_pipeline_gives_the_same_top_1(place: Path, size: int, crop: dict) -> None:
    """timm's model, data set, transforms and loader, as its validate script uses them; only the weights are ours."""
    ours = evaluate(place, "ema=false", f"image_size={size}", "batch_size=30")
    exported = torch.load(place / TRAINED / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    options = {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64), "conv_mlp": False}
    net = timm.create_model("convnextv2_tiny", num_classes=10, **options).eval()
    net.load_state_dict({k.removeprefix("net."): v for k, v in exported.items() if k.startswith("net.")})
    dataset = create_dataset("", root=str(place / "images"), split="val")
    loader = create_loader(
        dataset,
        (3, size, size),
        batch_size=30,
        use_prefetcher=False,
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        num_workers=0,
        **crop,
    )
    with torch.no_grad():
        found = [(net(images), labels) for images, labels in loader]
    logits, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    assert round(ours["acc1"] * 120) == int((logits.argmax(1) == labels).sum())
    assert ours["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert len(logits.argmax(1).unique()) > 2


def test_another_size_gives_other_numbers(place: Path) -> None:
    assert evaluate(place, "image_size=96")["loss"] != evaluate(place)["loss"]


def test_knn_equals_scikit_learns(place: Path) -> None:
    shutil.rmtree(place / "evaluated", ignore_errors=True)
    evaluate(place, "probe=knn", "knn.k=[10,20]")
    (train, labels), (held_out, truth) = features(place)
    scores = json.loads((place / "evaluated/about.json").read_text())["scores"]
    for k in (10, 20):
        theirs = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
        ).fit(train.astype(np.float64), labels)
        assert scores[str(k)] == pytest.approx((theirs.predict(held_out.astype(np.float64)) == truth).mean(), abs=1e-9)


def test_the_linear_probe_reaches_scikit_learns(place: Path) -> None:
    shutil.rmtree(place / "evaluated", ignore_errors=True)
    metrics = evaluate(place, "probe=linear", checkpoint=Path("outputs/pretrain/x"))
    (train, labels), (held_out, truth) = features(place)
    theirs = max(
        make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000))
        .fit(train, labels)
        .score(held_out, truth)
        for c in (1e-3, 1e-2, 1e-1, 1e0, 1e1)
    )
    assert metrics["acc1"] >= theirs - 0.005


def test_features_are_computed_once(place: Path) -> None:
    shutil.rmtree(place / "evaluated", ignore_errors=True)
    first = evaluate(place, "probe=knn")
    files = content(place / "evaluated")
    assert evaluate(place, "probe=knn") == first
    again = content(place / "evaluated")
    cached = [name for name in files if name.startswith("features-")]
    assert len(cached) == 2
    assert all(again[name] == files[name] for name in cached)
    evaluate(place, "probe=knn", "stages=[3,4]")  # other features get files of their own
    assert len(list((place / "evaluated").glob("features-*"))) == 4


def pictures(place: Path) -> Path:
    """Some odd ones: grey, wide, with an alpha channel, and one that is none."""
    folder = place / "odd"
    if not folder.exists():
        folder.mkdir()
        for number, (mode, size) in enumerate(
            [("L", (50, 40)), ("RGB", (200, 31)), ("RGBA", (33, 90)), ("P", (64, 64))]
        ):
            Image.effect_noise(size, 80).convert(mode).save(folder / f"{number}.png")
        (folder / "3b.jpg").write_text("no image")
    return folder


def by_hand(trained: Trained, file: Path) -> Tensor:
    """The logits of one picture, with nothing of the package but its transform."""
    prepared = trained.preparation.transform()(Decoded(Image.open(file).convert("RGB"))).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (trained.preparation.mean, trained.preparation.std))
    with torch.no_grad():
        logits: Tensor = trained.net(((prepared - mean) / std)[None])[0]
    return logits


def test_predictions_are_the_networks(place: Path) -> None:
    folder = pictures(place)
    options = [f"images={folder}", "out=predicted.csv", "top_k=3", "num_workers=0", "device=cpu"]
    result = command("predict", place, f"checkpoint={TRAINED}", *options)
    assert result.code == 0, result.err
    with (place / "predicted.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["0.png", "1.png", "2.png", "3.png"]
    trained = load_trained(place / TRAINED)
    for row in rows:
        shares = by_hand(trained, folder / row["image"]).softmax(0)
        best = shares.topk(3)
        assert [row[f"class_{rank}"] for rank in (1, 2, 3)] == [trained.class_names[index] for index in best.indices]
        assert [float(row[f"probability_{rank}"]) for rank in (1, 2, 3)] == pytest.approx(
            best.values.tolist(), rel=1e-4
        )
    skipped = [json.loads(line) for line in (place / "predicted.csv.skipped.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in skipped] == ["3b.jpg"]


@pytest.mark.parametrize("checkpoint", ["outputs/finetune/x", "outputs/pretrain/x"])
@pytest.mark.parametrize("stages", [None, [2, 4]])
def test_features_are_the_networks(place: Path, checkpoint: str, stages: list[int] | None) -> None:
    folder = pictures(place)
    options = [f"images={folder}", "out=features.npy", "num_workers=0", "device=cpu"]
    options += [f"stages={stages}".replace(" ", "")] if stages else []
    result = command("embed", place, f"checkpoint={checkpoint}", *options)
    assert result.code == 0, result.err
    values = np.load(place / "features.npy")
    with (place / "features.npy.images.csv").open() as file:
        names = [row["image"] for row in csv.DictReader(file)]
    assert names == ["0.png", "1.png", "2.png", "3.png"]
    trained, seen = load_trained(place / checkpoint), dict[int, Tensor]()
    for number, stage in enumerate(trained.net.stages, start=1):
        stage.register_forward_hook(lambda module, _, y, number=number: seen.update({number: y}))
    last = nn.Identity()
    trained.net.head.fc = last
    for name, row in zip(names, values, strict=True):
        pooled = by_hand(trained, folder / name)
        wanted = pooled if stages is None else torch.cat([seen[stage].mean((2, 3))[0] for stage in stages])
        assert np.allclose(row, wanted, atol=1e-5)


REFUSED = {
    "predict": {
        "checkpoint=outputs/pretrain/x": "outputs/pretrain/x/.* holds no classifier: fine-tune it first .*",
        "checkpoint=nowhere": "nowhere does not exist: give a run's folder, a checkpoint, an export or a state dict",
        "images=nowhere": "nowhere does not exist: name a folder of images",
        "top_k=0": "top_k=0 must be a whole number from 1",
        "out=predicted.txt": r"predicted.txt is no table: its name must end in .csv, .jsonl, .parquet.*",
        "out=no/such/folder.csv": "out=no/such/folder.csv: the folder no/such does not exist; make it, or name another",
        "device=tpu": "device='tpu' cannot be used .*",
        "batch_size=0": "batch_size=0 must be at least 1",
        "image_size=[64,96,3]": r"image_size=\[64, 96, 3\] must be one side or two, \[height, width\], from 32 pixels",
        "precision=fp8": "precision='fp8' is unknown: use 32 or bf16",
        "topk=3": "topk is not an option; did you mean top_k.",
    },
    "embed": {
        "stages=[5]": r"stages=\[5\] must be some of \[1, 2, 3, 4\].*",
        "stages=[]": r"stages=\[\] must be some .*",
    },
    "evaluate": {
        "checkpoint=outputs/pretrain/x": "outputs/pretrain/x/.* holds no classifier: add probe=knn .*",
        "split=test": "split='test' is unknown: use val or train or all",
        "probe=svm": "probe='svm' is unknown: use None or knn or linear",
        "data.path=odd": "odd holds 0 folders of classes, at least 2 are needed: .*",
        "data.path=others": "class 'cat' of the data is none of the 10 that .* knows .*: rename or leave out .*",
        "image_size=16": r"image_size=16 must be one side or two, \[height, width\], from 32 pixels",
    },
}


@pytest.mark.parametrize(
    ("verb", "option"), [(verb, option) for verb, options in REFUSED.items() for option in options]
)
def test_bad_input(place: Path, verb: str, option: str) -> None:
    folder = pictures(place)
    if not (place / "others").exists():
        for name in ("cat", "dog"):
            shutil.copytree(folder, place / "others" / name)
    given = {"checkpoint": str(TRAINED), "num_workers": "0", "device": "cpu", "out": "refused.csv"}
    given |= {"data.path": "images"} if verb == "evaluate" else {"images": str(folder)}
    key, _, value = option.partition("=")
    before = content(place)
    result = command(verb, place, *(f"{k}={v}" for k, v in (given | {key: value}).items()))
    assert re.fullmatch(REFUSED[verb][option], result.error), result.error
    assert content(place) == before


def test_too_many_broken_images_leave_no_table(place: Path, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_text("no image")
    shutil.copy(pictures(place) / "0.png", tmp_path)
    options = [f"images={tmp_path}", f"out={tmp_path}/p.csv", "num_workers=0", "device=cpu", "batch_size=1"]
    message = command("predict", place, f"checkpoint={TRAINED}", *options).error
    assert message.startswith("2 of 4 images cannot be read (max_broken=0.01), the last one 1.jpg")
    assert not list(tmp_path.glob("*p.csv*"))


def test_other_files_of_the_same_names_have_other_features(place: Path, tmp_path: Path) -> None:
    options = [f"checkpoint={TRAINED}", f"data.path={tmp_path}/images", "num_workers=0", "device=cpu", "probe=knn"]
    options += ["knn.k=5", f"out={tmp_path}/out"]
    shutil.copytree(place / "images", tmp_path / "images")
    assert command("evaluate", place, *options).code == 0
    first = json.loads((tmp_path / "out/metrics.json").read_text())
    for file in (tmp_path / "images").rglob("*.png"):
        Image.effect_noise((40, 40), 80).save(file)
    assert command("evaluate", place, *options).code == 0
    assert json.loads((tmp_path / "out/metrics.json").read_text())["acc1"] < first["acc1"] - 0.2


def test_skipped_images_are_remembered_with_the_features(place: Path, tmp_path: Path) -> None:
    options = [f"checkpoint={TRAINED}", f"data.path={tmp_path}/images", "num_workers=0", "device=cpu", "probe=knn"]
    shutil.copytree(place / "images", tmp_path / "images")
    broken = sorted((tmp_path / "images/val").rglob("*.png"))[0]
    broken.write_text("no image")
    for _ in range(2):
        result = command("evaluate", place, *options, f"out={tmp_path}/out")
        assert result.code == 0, result.err
        about = json.loads((tmp_path / "out/about.json").read_text())
        assert about["skipped"] == [str(broken.relative_to(tmp_path / "images"))]


def test_a_set_to_test_with_needs_no_images_to_learn_from(place: Path, tmp_path: Path) -> None:
    """One picture of each of two of the ten classes, and all of them are asked for."""
    for name in ("digit 3", "digit 7"):
        file = next((place / f"images/val/{name}").iterdir())
        (tmp_path / name).mkdir()
        shutil.copy(file, tmp_path / name)
    assert evaluate(place, f"data.path={tmp_path}", "split=all")["images"] == 2


def test_folders_named_by_numbers_are_classes_of_those_numbers(place: Path, tmp_path: Path) -> None:
    """A file that does not name its classes: folder 10 is class 10, although it is sorted behind folder 1."""
    torch.manual_seed(0)
    net = create_convnext("custom", depths=[1, 1, 1, 1], dims=[8, 16, 32, 64], in_chans=3, num_classes=12)
    with torch.no_grad():
        net.head.fc.weight.zero_()
        net.head.fc.bias.copy_(torch.arange(12) == 10)  # says 10, whatever it sees
    torch.save(net.state_dict(), tmp_path / "net.pth")
    for number in range(12):
        (tmp_path / f"val/{number}").mkdir(parents=True)
        for index in range(3 if number == 10 else 1):
            Image.effect_noise((40, 40), 80).save(tmp_path / f"val/{number}/{index}.png")
    shutil.copytree(tmp_path / "val", tmp_path / "train")
    metrics = evaluate(place, f"data.path={tmp_path}", checkpoint=tmp_path / "net.pth")
    assert metrics["acc1"] == pytest.approx(3 / 14)


def test_one_unreadable_file_is_no_table(place: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no image")
    options = [f"checkpoint={TRAINED}", f"images={tmp_path}/x.png", f"out={tmp_path}/p.csv", "device=cpu"]
    assert command("predict", place, *options).error.startswith("none of 1 images can be read, the last one x.png (")
    assert not (tmp_path / "p.csv").exists()


@pytest.mark.parametrize(
    ("verb", "option", "message"),
    [
        ("predict", "batch_size=abc", "batch_size='abc' must be a whole number"),
        ("predict", "checkpoint=null", "checkpoint=None must be text: a run's folder, a checkpoint, an export"),
        ("predict", "ema=maybe", "ema='maybe' is unknown: use None or True or False"),
        ("predict", "data.path=images", "data.path is not an option"),
        ("evaluate", "knn.k=x", "knn.k='x' must be .*"),
        ("evaluate", "linear.max_iterations=1.5", "linear.max_iterations=1.5 must be a whole number"),
    ],
)
def test_wrong_kinds(place: Path, verb: str, option: str, message: str) -> None:
    given = {"checkpoint": str(TRAINED), "out": "x.csv", "device": "cpu"}
    given |= {"data.path": "images"} if verb == "evaluate" else {"images": "images"}
    key, _, value = option.partition("=")
    error = command(verb, place, *(f"{k}={v}" for k, v in (given | {key: value}).items())).only_error
    assert re.fullmatch(message, error), error


def test_sigterm_leaves_no_half_written_table(place: Path, tmp_path: Path) -> None:
    options = [f"checkpoint={place / TRAINED}", f"images={place}/images", "out=p.csv", "device=cpu", "batch_size=1"]
    process = subprocess.Popen([sys.executable, "-m", "fcmae.predict", *options, "num_workers=0"], cwd=tmp_path)
    end = time.monotonic() + 120
    while not list(tmp_path.glob(".p.csv*")):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_the_images_of_a_list_are_predicted(place: Path, tmp_path: Path) -> None:
    files = sorted((place / "images" / "val").rglob("*.png"))[:3]
    (tmp_path / "some.txt").write_text("\n".join(map(str, files)))
    options = [f"checkpoint={TRAINED}", f"images={tmp_path}/some.txt", f"out={tmp_path}/p.csv", "device=cpu"]
    assert command("predict", place, *options, "num_workers=0").code == 0
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert [line.split(",")[0].rpartition("/")[2] for line in lines[1:]] == [file.name for file in files]
