"""Networks for transformers: its classes load them, compute the same, and prepare pictures nearly as we do."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from fake_hub import FakeHub
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from fcmae import UserError
from fcmae.checkpoints.weights import read_weights
from fcmae.conversion.hf import HuggingFace
from fcmae.data.decoding import open_picture
from fcmae.data.picture import Decoded
from fcmae.data.preparation import Preparation
from fcmae.inference.trained import Trained
from fcmae.models.convnext import create_convnext

Fill = Callable[[nn.Module], nn.Module]
STAGES = ["stage1", "stage2", "stage3", "stage4"]
PAGE = (Path(__file__).parents[1] / "docs/huggingface.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a photograph in it."""
    monkeypatch.chdir(tmp_path)
    photograph().save("image.jpg", quality=95)
    return tmp_path


def photograph() -> Image.Image:
    """Of a shape of which an even number of columns is cropped, so that nothing is moved by a pixel."""
    return Image.fromarray(load_sample_images().images[0]).crop((0, 0, 600, 400))


def prepared_for(side: tuple[int, int], crop_pct: float | str = "auto", channels: int = 3) -> Preparation:
    mean = tuple(0.4 + 0.01 * channel for channel in range(channels))
    std = tuple(0.3 - 0.01 * channel for channel in range(channels))
    return Preparation(image_size=side, mean=mean, std=std, crop_pct=crop_pct)


def trained(
    fill: Fill,
    size: str = "custom",
    *,
    depths: tuple[int, ...] = (1, 2, 1, 1),
    dims: tuple[int, ...] = (8, 16, 32, 64),
    classes: int = 5,
    channels: int = 3,
    multi_label: bool = False,
    use_grn: bool = True,
    side: tuple[int, int] = (64, 64),
    crop_pct: float | str = "auto",
) -> Trained:
    shape: dict[str, Any] = {"depths": depths, "dims": dims} if size == "custom" else {"depths": None, "dims": None}
    net: Any = fill(create_convnext(size, **shape, in_chans=channels, num_classes=classes, use_grn=use_grn))
    source: Any = SimpleNamespace(file=Path("run/last.ckpt"))
    names = tuple(f"class {number}" for number in range(classes))
    preparation = prepared_for(side, crop_pct, channels)
    return Trained(net=net.eval(), source=source, preparation=preparation, class_names=names, multi_label=multi_label)


def written(trained: Trained, folder: Path) -> Path:
    folder.mkdir(parents=True)
    conversion = HuggingFace()
    conversion.check(trained)
    conversion.write(trained, folder)
    return folder


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest, relative to the largest value but to no less than 1."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / max(1, ours.abs().max()))


def our_pixels(preparation: Preparation, picture: Image.Image) -> Tensor:
    return preparation.normalization()(preparation.transform()(Decoded(picture))[None])


@torch.inference_mode()
def our_probabilities(trained: Trained, picture: Image.Image) -> Tensor:
    logits: Tensor = trained.net(our_pixels(trained.preparation, picture))[0]
    return logits.sigmoid() if trained.multi_label else logits.softmax(0)


def scores(trained: Trained, found: list[dict[str, Any]]) -> Tensor:
    """Of a pipeline, in the order of our classes."""
    by_name = {each["label"]: each["score"] for each in found}
    return torch.tensor([by_name[name] for name in trained.class_names])


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize(("size", "channels"), [("atto", 3), ("tiny", 3), *(("custom", n) for n in (1, 3, 4, 13))])
def test_outputs_are_ours(tmp_path: Path, randomise: Fill, size: str, channels: int, classes: int) -> None:
    network = trained(randomise, size, channels=channels, classes=classes)
    out = written(network, tmp_path / "out")
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors", "preprocessor_config.json"}
    conversion, images = HuggingFace(), torch.randn(2, channels, 64, 96)
    several = conversion.expected(network, images), conversion.outputs(out, images)
    assert [len(outputs) for outputs in several] == [1 if network.class_names else 2] * 2  # the mean of features, too
    assert all(difference(ours, theirs) < 1e-5 for ours, theirs in zip(*several, strict=True))
    ours, theirs = (outputs[0] for outputs in several)
    assert difference(ours, theirs) < 1e-5
    kind = transformers.AutoModelForImageClassification if classes else transformers.AutoModel
    _, loading = kind.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.inference_mode():
        features = transformers.AutoModel.from_pretrained(out)(images)
        assert difference(network.net.forward_features(images), features.last_hidden_state) < 1e-5
        pooled = network.net.forward_head(network.net.forward_features(images), pre_logits=True)
    assert difference(pooled, features.pooler_output) < 1e-5


@settings(max_examples=8)
@given(
    depths=st.tuples(*[st.integers(1, 3)] * 4),
    dims=st.tuples(*[st.integers(1, 12)] * 4),
    classes=st.sampled_from([0, 1, 2, 7]),
    channels=st.sampled_from([1, 2, 3, 5]),
)
def test_networks_of_any_shape(
    tmp_path_factory: pytest.TempPathFactory, randomise: Fill, depths: Any, dims: Any, classes: int, channels: int
) -> None:
    """In float64: a norm over two or three channels that are nearly alike magnifies the rounding of float32."""
    network = trained(randomise, depths=depths, dims=dims, classes=classes, channels=channels)
    out = written(network, tmp_path_factory.mktemp("any") / "out")
    network.net.double()
    kind = transformers.AutoModelForImageClassification if classes else transformers.AutoModel
    images = torch.randn(1, channels, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        theirs = kind.from_pretrained(out).double()(images)
    ours = HuggingFace().expected(network, images)[0]
    assert difference(ours, theirs.logits if classes else theirs.last_hidden_state) < 1e-10


def test_weights_come_back(tmp_path: Path, randomise: Fill) -> None:
    network = trained(randomise)
    back, ours = read_weights(written(network, tmp_path / "out")).weights, network.net.state_dict()
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name].reshape(value.shape), value) for name, value in ours.items())


def test_the_configuration_says_what_the_network_is(tmp_path: Path, randomise: Fill) -> None:
    network = trained(randomise, channels=4, multi_label=True, side=(64, 96), crop_pct="warp")
    said = json.loads((written(network, tmp_path / "out") / "config.json").read_text())
    expected = {
        "architectures": ["ConvNextV2ForImageClassification"],
        "depths": [1, 2, 1, 1],
        "hidden_sizes": [8, 16, 32, 64],
        "num_channels": 4,
        "image_size": [64, 96],
        "layer_norm_eps": 1e-6,
        "problem_type": "multi_label_classification",
        "id2label": {str(number): f"class {number}" for number in range(5)},
        "label2id": {f"class {number}": number for number in range(5)},
    }
    assert {key: said[key] for key in expected} == expected
    headless = json.loads((written(trained(randomise, classes=0), tmp_path / "encoder") / "config.json").read_text())
    assert headless["architectures"] == ["ConvNextV2Model"]
    assert not {"id2label", "num_classes", "num_labels", "problem_type"} & headless.keys()


def pictures() -> dict[str, Image.Image]:
    """Photographs and parts of them: tall, wide, smaller than a network's input and much larger, of odd sizes."""
    one, other = (Image.fromarray(image) for image in load_sample_images().images)
    return {
        "first": one,
        "second": other,
        "tall": one.crop((100, 0, 300, 427)),
        "wide": other.crop((0, 100, 640, 301)),
        "small": one.resize((150, 100)),
        "odd": other.resize((333, 251)),
        "large": one.resize((2000, 1333)),
        "large and odd": other.resize((1777, 1111)),
    }


CASES = [
    ((224, 224), "auto", "ConvNextImageProcessor"),
    ((64, 64), 0.95, "ConvNextImageProcessor"),
    ((384, 384), "auto", "ConvNextImageProcessor"),
    ((224, 224), "warp", "CLIPImageProcessor"),
    ((384, 384), 0.9, "CLIPImageProcessor"),
    ((192, 320), "warp", "CLIPImageProcessor"),
    ((384, 512), "auto", "CLIPImageProcessor"),
]


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
@pytest.mark.parametrize(("side", "crop_pct", "kind"), CASES)
def test_transformers_prepares_pictures_as_we_do(
    tmp_path: Path, randomise: Fill, side: tuple[int, int], crop_pct: float | str, kind: str, backend: str
) -> None:
    network = trained(randomise, side=side, crop_pct=crop_pct)
    out = written(network, tmp_path / "out")
    assert json.loads((out / "preprocessor_config.json").read_text())["image_processor_type"] == kind
    processor = transformers.AutoImageProcessor.from_pretrained(out, backend=backend)
    assert type(processor).__name__ == kind + ("Pil" if backend == "pil" else "")
    std = 255 * torch.tensor(network.preparation.std).view(-1, 1, 1)
    for name, picture in pictures().items():
        ours = our_pixels(network.preparation, picture)
        theirs = processor(picture, return_tensors="pt").pixel_values
        assert ours.shape == theirs.shape
        with torch.inference_mode():
            chances = network.net(torch.cat([ours, theirs])).softmax(1)
        assert chances[0].argmax() == chances[1].argmax(), name
        moved = float((chances[0] - chances[1]).abs().max())
        apart, shift = nearest(ours * std, theirs * std)
        told = f"mean {apart.mean():.3f}, max {apart.max():.2f}, {shift} pixels off, probabilities {moved:.4f}"
        print(f"{side} {crop_pct} {backend} {name}: {told}")
        mean, most = (1e-4, 1e-3) if backend == "pil" else (0.3, 12)
        assert apart.mean() < mean, name
        assert apart.max() < most, name
        assert moved < (1e-3 if shift == (0, 0) else 0.1), name
        if network.preparation.crop_share is None:
            assert shift == (0, 0), name


def test_the_processor_puts_transparent_pictures_on_white(tmp_path: Path, randomise: Fill) -> None:
    processor = transformers.AutoImageProcessor.from_pretrained(written(trained(randomise), tmp_path / "out"))
    picture = photograph().convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    theirs, ours = (processor(each, return_tensors="pt").pixel_values for each in (picture, on_white))
    assert torch.equal(theirs, ours)


def nearest(ours: Tensor, theirs: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The differences where their pictures, moved by at most a pixel down and right, fit ours best."""
    shifts = [(down, right) for down in (0, 1) for right in (0, 1)]
    height, width = ours.shape[2:]

    def apart(shift: tuple[int, int]) -> Tensor:
        down, right = shift
        return (ours[..., : height - down, : width - right] - theirs[..., down:, right:]).abs()

    best = min(shifts, key=lambda shift: float(apart(shift).mean()))
    return apart(best), best


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_pipeline_reads_files(folder: Path, randomise: Fill, multi_label: bool) -> None:
    network = trained(randomise, multi_label=multi_label, side=(224, 224))
    classifier = transformers.pipeline("image-classification", model=str(written(network, folder / "out")))
    photograph().convert("RGBA").save("alpha.png")
    photograph().convert("L").save("grey.png")
    for file in ("image.jpg", "alpha.png", "grey.png"):
        with Image.open(file) as picture:
            ours = our_probabilities(network, picture.convert("RGB"))
        theirs = scores(network, classifier(file, top_k=5))
        assert (ours - theirs).abs().max() < 1e-3, file
        assert ours.argmax() == theirs.argmax()
        assert theirs.max() - theirs.min() > 0.1  # they could differ


@pytest.mark.parametrize("channels", [1, 4])
def test_the_pipeline_takes_arrays_of_other_channels(folder: Path, randomise: Fill, channels: int) -> None:
    network = trained(randomise, channels=channels, side=(224, 224))
    classifier = transformers.pipeline("image-classification", model=str(written(network, folder / "out")))
    with pytest.raises((ValueError, RuntimeError)):
        classifier("image.jpg")  # three channels: not a silent mistake
    picture = np.array(photograph().convert("L" if channels == 1 else "RGBA")).reshape(400, 600, channels)
    pixels = Decoded(torch.from_numpy(picture).permute(2, 0, 1))
    ours = network.net(network.preparation.normalization()(network.preparation.transform()(pixels)[None]))
    assert (ours.softmax(1)[0] - scores(network, classifier(picture, top_k=5))).abs().max() < 1e-3


@torch.inference_mode()
def test_the_pipeline_takes_greys_of_16_bits_as_the_page_has_it(folder: Path, randomise: Fill) -> None:
    network = trained(randomise, channels=1, side=(224, 224))
    classifier = transformers.pipeline("image-classification", model=str(written(network, folder / "out")))
    Image.fromarray(np.array(photograph().convert("L")).astype(np.uint16) * 257).save("image.png")
    (scaled,) = re.findall(r"`(np\.asarray\(.*?)`", PAGE)
    picture = open_picture("image.png", name="image.png", in_chans=1)
    ours = network.net(network.preparation.normalization()(network.preparation.transform()(picture)[None]))
    theirs = scores(network, classifier(eval(scaled), top_k=5))
    assert (ours.softmax(1)[0] - theirs).abs().max() < 1e-5


def test_an_oblong_crop_has_no_processor_and_the_pipeline_says_so(tmp_path: Path, randomise: Fill) -> None:
    out = written(trained(randomise, side=(64, 96)), tmp_path / "out")
    assert not (out / "preprocessor_config.json").exists()
    with pytest.raises(OSError, match=r"preprocessor_config\.json"):
        transformers.pipeline("image-classification", model=str(out))


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("side", [(64, 64), (64, 96)])
@pytest.mark.parametrize("channels", [1, 3, 13])
def test_the_lines_of_the_model_card(
    folder: Path, randomise: Fill, channels: int, side: tuple[int, int], classes: int
) -> None:
    network = trained(randomise, channels=channels, classes=classes, side=side)
    written(network, folder / "out")
    names, printed = run(HuggingFace().usage("out", network))
    image = photograph().convert("L" if channels == 1 else "RGB")
    with Image.open("image.jpg") as opened:
        image = opened.convert(image.mode)
    pixels = our_pixels(network.preparation, image) if channels < 4 else names["images"]
    assert pixels.shape == (1, channels, *side)
    expected = HuggingFace().expected(network, pixels)[0]
    if classes:
        assert network.class_names[int(expected.argmax())] in printed
    if "outputs" in names:
        assert difference(expected, names["outputs"]) < (1e-5 if side == (64, 96) or channels == 13 else 1e-2)
    else:
        assert classes
        assert channels == 3
        assert printed.startswith("[{'label'")


@torch.inference_mode()
@pytest.mark.parametrize("classes", [0, 5])
def test_the_backbone_gives_timms_maps_behind_a_norm(tmp_path: Path, randomise: Fill, classes: int) -> None:
    network = trained(randomise, classes=classes)
    out = written(network, tmp_path / "out")
    net, images = network.net, torch.randn(2, 3, 96, 64)
    maps = transformers.ConvNextV2Backbone.from_pretrained(out, out_features=STAGES)(images).feature_maps
    theirs = timm.create_model("convnextv2_tiny", depths=(1, 2, 1, 1), dims=(8, 16, 32, 64), features_only=True).eval()
    theirs.load_state_dict(
        {
            name.replace("stages.", "stages_").replace("stem.", "stem_"): value
            for name, value in net.state_dict().items()
            if not name.startswith("head.")
        }
    )
    for ours, found in zip(theirs(images), maps, strict=True):
        normed = F.layer_norm(ours.permute(0, 2, 3, 1), ours.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)
        assert difference(normed, found) < 1e-5


def test_auto_backbone_finds_it_on_the_hub(tmp_path: Path, randomise: Fill) -> None:
    """In a process of its own: the hub's address is read when Python starts."""
    out = written(trained(randomise), tmp_path / "out")
    script = (
        "import torch\n"
        "from transformers import AutoBackbone\n"
        f"net = AutoBackbone.from_pretrained('user/net', out_features={STAGES})\n"
        "print([tuple(found.shape) for found in net(torch.zeros(1, 3, 64, 64)).feature_maps])\n"
        "print(float(net.embeddings.patch_embeddings.weight.detach().double().sum()))"
    )
    with FakeHub() as hub:
        hub.add("user/net", {file.name: file.read_bytes() for file in out.iterdir()})
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        found = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=300
        )
    shapes, total = (found.stdout.splitlines() or [found.stderr, ""])[-2:]
    assert shapes == "[(1, 8, 16, 16), (1, 16, 8, 8), (1, 32, 4, 4), (1, 64, 2, 2)]", found.stderr
    stem = transformers.AutoModel.from_pretrained(out).embeddings.patch_embeddings.weight.detach().double().sum()
    assert float(total) == pytest.approx(float(stem))


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "bound"), [("bfloat16", 0.005), ("float16", 0.002), ("int8", 0.02)])
def test_fewer_bits_change_probabilities_little(tmp_path: Path, randomise: Fill, kind: str, bound: float) -> None:
    network = trained(randomise, "atto", side=(224, 224))
    out = written(network, tmp_path / "out")
    dtype = getattr(torch, kind) if kind != "int8" else torch.float32
    model = transformers.AutoModelForImageClassification.from_pretrained(out, dtype=dtype)
    if kind == "int8":
        quantize_(model, Int8WeightOnlyConfig())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    images = our_pixels(network.preparation, photograph())
    apart = (model(images.to(dtype)).logits.float().softmax(1) - network.net(images).softmax(1)).abs().max()
    print(f"{kind}: probabilities of {network.net.num_classes} classes move by up to {apart:.4f}")
    assert 0 < apart < bound


def run(code: str) -> tuple[dict[str, Any], str]:
    """What a snippet defines, and prints."""
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return names, printed.getvalue()


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_the_page(folder: Path, randomise: Fill, number: int) -> None:
    tiny = trained(randomise)
    written(tiny, folder / "tiny-hf")
    written(trained(randomise, channels=1), folder / "grey-hf")
    written(trained(randomise, channels=13), folder / "bands-hf")
    assert len(SNIPPETS) == 7
    names, printed = run(SNIPPETS[number])
    if number == 0:
        assert printed.startswith("[{'label': 'class ")
    elif number == 1:
        assert names["features"].shape == (1, 64, 2, 2)
        assert names["pooled"].shape == (1, 64)
    elif number == 3:
        assert names["logits"].shape == (1, 5)
    elif number == 4:
        stem = names["model"].backbone.embeddings.patch_embeddings.weight
        assert torch.equal(stem, tiny.net.stem[0].weight)
        assert stem.grad is not None
        assert names["model"].decode_head.classifier.weight.grad.abs().sum() > 0
    elif number == 5:
        assert names["model"].dtype == torch.bfloat16
    elif number == 6:
        layer = names["model"].convnextv2.encoder.stages[0].layers[0].pwconv1
        assert "Int8" in type(layer.weight).__name__


def test_networks_without_grn_are_refused(randomise: Fill) -> None:
    with pytest.raises(UserError, match=r"^run/last\.ckpt has no GRN .*: use to=timm$"):
        HuggingFace().check(trained(randomise, use_grn=False))


def test_without_transformers_the_extra_is_named(randomise: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r'pip install "fcmae\[export\]"$'):
        HuggingFace().check(trained(randomise))
