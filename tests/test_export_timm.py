"""Networks for timm and for the authors' code: loaded there they compute the same, and they come back bit for bit."""

import copy
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform, resolve_model_data_config
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from fcmae import UserError
from fcmae.checkpoints.format import FORMAT
from fcmae.checkpoints.load_into import load_into
from fcmae.checkpoints.weights import read_weights
from fcmae.conversion.hf import HuggingFace
from fcmae.conversion.official import Official
from fcmae.conversion.timm import Timm
from fcmae.data.picture import Decoded
from fcmae.inference.trained import Trained, load_trained
from fcmae.models.convnext import SIZES, create_convnext

Fill = Callable[[nn.Module], nn.Module]
KINDS = [(channels, classes) for channels in (1, 3, 13) for classes in (0, 5)]


def network(size: str = "custom", *, channels: int = 3, classes: int = 5, use_grn: bool = True) -> ConvNeXt:
    depths, dims = ((1, 2, 1, 1), (8, 16, 32, 64)) if size == "custom" else (None, None)
    net = create_convnext(size, depths=depths, dims=dims, in_chans=channels, num_classes=classes, use_grn=use_grn)
    return net.eval()


def trained(folder: Path, fill: Fill, **options: Any) -> Trained:
    """As from a run of ours: a checkpoint is written to `folder`, and read."""
    said = {"image_size": [64, 64], "crop_pct": "auto"} | {
        key: options.pop(key) for key in ("image_size", "crop_pct") if key in options
    }
    net = fill(network(**options))
    channels, classes = net.stem[0].in_channels, net.num_classes
    given = {"image_size": said["image_size"], "in_chans": channels}
    given |= {"mean": [0.4 + 0.01 * c for c in range(channels)], "std": [0.3 - 0.01 * c for c in range(channels)]}
    description = {"format": FORMAT, "fcmae": "0", "task": "pretraining", "model": {}, "input": given}
    prefix = "model.encoder.net."
    if classes:
        names = [f"class {number}" for number in range(classes)]
        description |= {"task": "classification", "class_names": names, "crop_pct": said["crop_pct"]}
        prefix = "net."
    state = {prefix + name: value for name, value in net.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"fcmae": description, "state_dict": state}, folder / "last.ckpt")
    return load_trained(folder / "last.ckpt")


def photographs() -> list[Image.Image]:
    """Two real ones, 640 x 427, and a tall one."""
    images = [Image.fromarray(image) for image in load_sample_images().images]
    return [*images, images[0].rotate(90, expand=True).crop((50, 0, 350, 631))]


def prepared(trained: Trained) -> Tensor:
    """Those, normalised, with as many channels as the network takes: (3, C, H, W)."""
    preparation = trained.preparation
    pixels = torch.stack([preparation.transform()(Decoded(image)) for image in photographs()])
    return preparation.normalization()(pixels[:, torch.arange(preparation.in_chans) % 3])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """timm has nothing to warn of."""
    yield
    records = [record for record in caplog.get_records("call") if record.name.startswith("timm")]
    assert not [record.getMessage() for record in records if record.levelname == "WARNING"]


@pytest.mark.parametrize(("channels", "classes"), KINDS)
def test_timm_computes_the_same(channels: int, classes: int, randomise: Fill, out: Path) -> None:
    ours = trained(out.parent, randomise, channels=channels, classes=classes)
    images = prepared(ours)
    Timm().check(ours)
    Timm().write(ours, out)
    assert {file.name for file in out.iterdir()} == {"model.safetensors", "config.json"}
    (expected,), (found,) = Timm().expected(ours, images), Timm().outputs(out, images)
    assert torch.equal(found, expected)
    assert expected.shape == ((3, 5) if classes else (3, 64, 2, 2))
    net = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert net.pretrained_cfg.get("label_names") == (list(ours.class_names) or None)
    assert net.pretrained_cfg["num_classes"] == net.num_classes == classes
    # timm 1.0.21 takes a first convolution that is named for one of three channels, and drops it if it is not.
    assert net.pretrained_cfg["first_conv"] == ("stem.0" if channels == 3 else None)
    assert not torch.equal(found, Timm().outputs(out, images.flip(0))[0])


@pytest.mark.parametrize("options", [{"size": "atto"}, {"size": "femto", "classes": 0}, {"use_grn": False}], ids=str)
def test_timm_names_the_architecture(options: dict[str, Any], randomise: Fill, out: Path) -> None:
    """Published sizes need their name alone, and other ways of loading a file take them."""
    ours = trained(out.parent, randomise, **options)
    images = prepared(ours)
    Timm().write(ours, out)
    config = json.loads((out / "config.json").read_text())
    expected, found = Timm().expected(ours, images)[0], Timm().outputs(out, images)[0]
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    own = {"depths": [1, 2, 1, 1], "dims": [8, 16, 32, 64], "use_grn": False}
    assert config["architecture"] == f"convnextv2_{options.get('size', 'tiny')}"
    assert config.get("model_args") == (None if "size" in options else own)

    name, given = config["architecture"], config.get("model_args", {}) | {"num_classes": config["num_classes"]}
    file = str(out / "model.safetensors")
    overlay = {"file": file, "num_classes": config["num_classes"]}
    nets = [
        timm.create_model(name, checkpoint_path=file, **given),
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **given),
    ]
    for net in nets:
        with torch.inference_mode():
            assert torch.equal((net.eval() if ours.class_names else net.eval().forward_features)(images), found)


PREPARATIONS = [
    ((64, 64), "auto"),
    ((224, 224), "auto"),
    ((96, 96), 1.0),
    ((192, 192), 0.95),
    ((128, 96), "auto"),
    ((96, 160), 0.9),
    ((64, 96), "warp"),
    ((384, 384), "auto"),
    ((384, 256), "auto"),
    ((416, 416), 0.875),
]


@pytest.mark.parametrize(("image_size", "crop_pct"), PREPARATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_timms_transform_makes_the_same_pixels(
    image_size: tuple[int, int], crop_pct: Any, channels: int, randomise: Fill, out: Path
) -> None:
    ours = trained(out.parent, randomise, channels=channels, image_size=list(image_size), crop_pct=crop_pct)
    Timm().write(ours, out)
    transform = create_transform(**resolve_model_data_config(timm.create_model(f"local-dir:{out}")))
    preparation = ours.preparation
    for photograph in photographs():
        image = photograph.convert("L" if channels == 1 else "RGB")
        expected = preparation.normalization()(preparation.transform()(Decoded(image))[None])[0]
        found = transform(image)
        assert found.shape == (channels, *image_size)
        assert (found - expected).abs().max() < 1e-6


def test_nothing_of_the_authors_is_claimed(randomise: Fill, out: Path) -> None:
    ours = trained(out.parent, randomise, size="atto")
    Timm().write(ours, out)
    config = json.loads((out / "config.json").read_text())
    assert config.keys() == {"architecture", "num_classes", "num_features", "label_names", "pretrained_cfg"}
    assert config["pretrained_cfg"] == {
        "tag": "fcmae_own_ft",
        "custom_load": False,
        "input_size": [3, 64, 64],
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "crop_mode": "center",
        "mean": list(ours.preparation.mean),
        "std": list(ours.preparation.std),
        "num_classes": 5,
        "pool_size": [2, 2],
        "first_conv": "stem.0",
        "classifier": "head.fc",
    }
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).pretrained_cfg
    authors = timm.create_model("convnextv2_atto").pretrained_cfg
    for key in ("url", "hf_hub_id", "origin_url", "paper_ids", "paper_name", "license", "test_input_size"):
        assert key in authors or key in ("paper_ids", "paper_name")
        assert key not in loaded


def test_timm_adapts_an_export_as_its_own(randomise: Fill, out: Path) -> None:
    ours = trained(out.parent, randomise)
    Timm().write(ours, out)
    stem = ours.net.stem[0].weight
    other = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=7, in_chans=1)
    assert torch.allclose(other.stem[0].weight, stem.sum(1, keepdim=True))
    assert torch.equal(other.stages[3].blocks[0].conv_dw.weight, ours.net.stages[3].blocks[0].conv_dw.weight)
    assert other.head.fc.weight.shape == (7, 64)
    maps = timm.create_model(f"local-dir:{out}", pretrained=True, features_only=True)(prepared(ours))
    assert [values.shape[1] for values in maps] == [8, 16, 32, 64]


@pytest.mark.parametrize(("channels", "classes"), KINDS)
def test_transformers_takes_an_export_of_timms(
    channels: int, classes: int, randomise: Fill, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its wrapper; `num_classes` in `model_args` would break it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    ours = trained(out.parent, randomise, channels=channels, classes=classes)
    images = prepared(ours)
    Timm().write(ours, out)
    with torch.inference_mode():
        features = transformers.AutoModel.from_pretrained(out).eval()(images).last_hidden_state
        assert torch.equal(features, ours.net.forward_features(images))
        if not classes:
            return
        net = transformers.AutoModelForImageClassification.from_pretrained(out).eval()
        assert torch.equal(net(images).logits, ours.net(images))
    assert tuple(net.config.id2label.values()) == ours.class_names


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    first, second = ours.state_dict(), theirs.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


LARGE = ("small", "base", "large", "huge")
ROUNDS = [
    pytest.param(size, *kind, marks=[pytest.mark.slow] if size in LARGE else [])
    for size in SIZES
    for kind in KINDS
    if kind[0] != 1 and (size not in LARGE or kind in ((3, 5), (13, 0)))
]


@pytest.mark.parametrize("conversion", [Timm(), Official(), HuggingFace()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize(("size", "channels", "classes"), ROUNDS)
def test_there_and_back(
    conversion: Timm | Official | HuggingFace, size: str, channels: int, classes: int, randomise: Fill, out: Path
) -> None:
    net = randomise(network(size, channels=channels, classes=classes))
    micro = trained(out.parent, randomise, channels=channels, classes=classes)
    conversion.write(replace(micro, net=net), out)
    back = network(size, channels=channels, classes=classes)
    assert not same(net, back)
    report = load_into(back, read_weights(out))
    assert not report.fresh
    assert not report.left_out
    assert same(net, back)


class DenseGRN(nn.Module):
    """The paper's equations 1 to 3, channels last."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        norms = (x**2).sum((1, 2), keepdim=True) ** 0.5
        return self.gamma * x * norms / (norms.mean(3, keepdim=True) + 1e-6) + self.beta + x


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over channels, of channels first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, 3)).movedim(3, 1)


class DenseBlock(nn.Module):
    """The paper's figure 5, right."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.grn = nn.Linear(dim, 4 * dim), DenseGRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).movedim(1, 3))
        return x + self.pwconv2(self.grn(nn.functional.gelu(self.pwconv1(y)))).movedim(3, 1)


class Dense(nn.Module):
    """ConvNeXt V2 with the authors' names for its parts."""

    def __init__(self, channels: int, classes: int, depths: tuple[int, ...], dims: tuple[int, ...]) -> None:
        super().__init__()
        first = nn.Sequential(nn.Conv2d(channels, dims[0], 4, 4), ChannelNorm(dims[0], eps=1e-6))
        later = [
            nn.Sequential(ChannelNorm(before, eps=1e-6), nn.Conv2d(before, after, 2, 2))
            for before, after in itertools.pairwise(dims)
        ]
        self.downsample_layers = nn.ModuleList([first, *later])
        stages = [[DenseBlock(dim) for _ in range(depth)] for depth, dim in zip(depths, dims, strict=True)]
        self.stages = nn.ModuleList([nn.Sequential(*blocks) for blocks in stages])
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], classes)

    def forward_features(self, x: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.forward_features(x).mean((2, 3))))
        return logits


@pytest.mark.parametrize(("channels", "classes"), KINDS)
def test_the_authors_network_computes_the_same(channels: int, classes: int, randomise: Fill, out: Path) -> None:
    ours = trained(out.parent, randomise, channels=channels, classes=classes)
    images = prepared(ours)
    Official().check(ours)
    Official().write(ours, out)
    content = torch.load(out / "model.pth", weights_only=True)
    assert content.keys() == {"model"}
    state = content["model"]
    dense = Dense(channels, 5, (1, 2, 1, 1), (8, 16, 32, 64)).eval()
    if not classes:
        # As their fine-tuning treats what comes from pre-training; the classifier is new.
        other = torch.load(out / "finetune.pth", weights_only=True)["model"]
        remapped = {name: value[None, None] if ".grn." in name else value for name, value in other.items()}
        assert state.keys() == remapped.keys()
        assert all(torch.equal(remapped[name], value) for name, value in state.items())
        state |= {name: value for name, value in dense.state_dict().items() if name.startswith("head.")}
    dense.load_state_dict(state)
    expected = Official().expected(ours, images)[0]
    with torch.inference_mode():
        theirs = dense(images) if classes else dense.forward_features(images)
    bound = 1e-5 * max(1, expected.abs().max())
    assert (theirs - expected).abs().max() <= bound
    assert (Official().outputs(out, images)[0] - expected).abs().max() <= bound


@pytest.mark.parametrize("classes", [0, 5])
def test_timm_reads_the_authors_files_in_another_way(classes: int, randomise: Fill, out: Path) -> None:
    """By `pretrained_cfg_overlay`, as one loads a file in place of the released one."""
    ours = trained(out.parent, randomise, size="atto", classes=classes)
    Official().write(ours, out)
    overlay = {"file": str(out / "model.pth"), "num_classes": classes}
    net = timm.create_model("convnextv2_atto", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes)
    theirs = net.state_dict()
    assert all(torch.equal(theirs[name].flatten(), value.flatten()) for name, value in ours.net.state_dict().items())


def test_a_damaged_official_file_is_no_success(randomise: Fill, out: Path) -> None:
    """Or the verification could not fail."""
    ours = trained(out.parent, randomise)
    images = prepared(ours)
    Official().write(ours, out)
    state = torch.load(out / "model.pth", weights_only=True)["model"]
    swapped = copy.copy(state)
    swapped["stages.1.0.grn.gamma"] = state["stages.1.1.grn.gamma"]
    torch.save({"model": swapped}, out / "model.pth")
    assert (Official().outputs(out, images)[0] - Official().expected(ours, images)[0]).abs().max() > 1e-4
    del state["stages.1.0.grn.gamma"]
    torch.save({"model": state}, out / "model.pth")
    with pytest.raises(RuntimeError, match="Missing key"):
        Official().outputs(out, images)


def test_the_authors_network_has_grn(randomise: Fill, out: Path) -> None:
    ours = trained(out.parent, randomise, use_grn=False)
    with pytest.raises(UserError) as caught:
        Official().check(ours)
    assert re.fullmatch(r".*last\.ckpt has no GRN layers, .*: use to=timm", str(caught.value))


@pytest.mark.parametrize(
    ("name", "source"),
    [("user/name", "hf-hub"), ("./exports/atto", "local-dir"), ("/data/atto", "local-dir"), ("atto", "local-dir")],
)
def test_where_the_usage_says_to_load_from(name: str, source: str, randomise: Fill, tmp_path: Path) -> None:
    assert f'"{source}:{name}"' in Timm().usage(name, trained(tmp_path, randomise))
