"""Backbones: other libraries compute our four maps from the files, and the page's snippets run on them."""

import ast
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from test_weights import DEPTHS, DIMS, micro_net, refusal, saved
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from fcmae.conversion.backbone import Backbone
from fcmae.conversion.timm import Timm
from fcmae.errors import UserError
from fcmae.inference.trained import Trained, load_trained
from fcmae.models.convnext import create_convnext

Randomise = Callable[[nn.Module], nn.Module]
PAGE = (Path(__file__).parents[1] / "docs" / "backbones.md").read_text()
SNIPPETS = re.findall(r"^## ([\w-]+).*?^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
BACKBONE = Backbone()
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """Two, in colours, of a size that no stage divides."""
    pixels = torch.from_numpy(np.stack(load_sample_images().images))[:, 100:233, 100:303]
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def trained(net: ConvNeXt, folder: Path) -> Trained:
    return replace(load_trained(saved(net.state_dict(), folder / "net.pth")), net=net.eval())


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@torch.no_grad()
def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest, as a share of the largest output, at least 1."""
    assert [map.shape for map in ours] == [map.shape for map in theirs]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("size", ["micro", "atto"])  # with matrices in the MLPs, and with 1x1 convolutions
def test_the_maps_are_ours(size: str, classes: int, photographs: Tensor, randomise: Randomise, tmp_path: Path) -> None:
    options: Any = {"depths": None, "dims": None, "in_chans": 3, "num_classes": classes}
    net = randomise(micro_net(classes) if size == "micro" else create_convnext("atto", **options))
    network = trained(net, tmp_path)
    BACKBONE.check(network)
    BACKBONE.write(network, folder := made(tmp_path / "out"))
    maps = BACKBONE.outputs(folder, photographs)
    assert [tuple(map.shape[2:]) for map in maps] == [(33, 50), (16, 25), (8, 12), (4, 6)]
    assert difference(maps, BACKBONE.expected(network, photographs)) < 1e-5
    for map in maps:  # norms of ones and zeros
        torch.testing.assert_close(map.mean(1), torch.zeros_like(map[:, 0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(map.var(1, correction=0), torch.ones_like(map[:, 0]), atol=1e-2, rtol=0)


@settings(max_examples=12)
@example(depths=(1, 3, 1, 1), dims=(16, 16, 8, 24), in_chans=1, sides=(33, 95))
@given(
    depths=st.tuples(*[st.integers(1, 3)] * 4),
    dims=st.tuples(*[st.integers(8, 24)] * 4),
    in_chans=st.integers(1, 6),
    sides=st.tuples(*[st.integers(32, 100)] * 2),
)
def test_of_any_network_and_size(
    randomise: Randomise, depths: tuple[int, ...], dims: tuple[int, ...], in_chans: int, sides: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        network = trained(randomise(micro_net(0, depths=depths, dims=dims, in_chans=in_chans)), folder)
        BACKBONE.write(network, out := made(folder / "out"))
        images = torch.randn(2, in_chans, *sides)
        maps = BACKBONE.outputs(out, images)
        assert [map.shape[1] for map in maps] == list(dims)
        assert difference(maps, BACKBONE.expected(network, images)) < 1e-5


@pytest.fixture
def network(randomise: Randomise, tmp_path: Path) -> Trained:
    """With a classifier of five, for images normalised in a way of its own."""
    network = trained(randomise(micro_net()), tmp_path)
    return replace(network, preparation=replace(network.preparation, mean=MEAN, std=STD))


@pytest.fixture
def written(network: Trained, tmp_path: Path) -> Path:
    BACKBONE.write(network, folder := made(tmp_path / "micro-backbone"))
    return folder


def test_the_files(written: Path, capfd: pytest.CaptureFixture[str], network: Trained) -> None:
    assert {file.name for file in written.iterdir()} == {"config.json", "model.safetensors", "openmmlab.pth"}
    for weights in (load_file(written / "model.safetensors"), torch.load(written / "openmmlab.pth")["state_dict"]):
        assert not [name for name in weights if re.match(r"classifier|head|layernorm|norm\.", name)]
        assert all(type(value) is Tensor and not value.requires_grad for value in weights.values())
        norms = {name: value for name, value in weights.items() if re.match(r"hidden_states_norms|norm\d", name)}
        assert len(norms) == 8
        assert all((value == (1 if name.endswith("weight") else 0)).all() for name, value in norms.items())
    capfd.readouterr()
    BACKBONE.write(network, made(written / "again"))
    BACKBONE.outputs(written / "again", torch.randn(1, 3, 64, 64))
    assert capfd.readouterr() == ("", "")  # no progress bars


def test_a_wrong_weight_is_noticed(network: Trained, written: Path, photographs: Tensor) -> None:
    weights = load_file(written / "model.safetensors")
    name = "encoder.stages.3.layers.0.grn.weight"
    save_file(weights | {name: weights[name] + 0.1}, written / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"openmmlab.pth did not come out as the rest"):
        BACKBONE.outputs(written, photographs)
    file = torch.load(written / "openmmlab.pth", weights_only=True)
    file["state_dict"]["stages.3.0.grn.gamma"] += 0.1
    torch.save(file, written / "openmmlab.pth")
    assert difference(BACKBONE.outputs(written, photographs), BACKBONE.expected(network, photographs)) > 1e-3


def test_auto_backbone_takes_it_from_the_hub(
    network: Trained, written: Path, monkeypatch: pytest.MonkeyPatch, photographs: Tensor
) -> None:
    from transformers import AutoBackbone, ConvNextV2Backbone

    monkeypatch.setattr("huggingface_hub.HfApi.repo_exists", lambda *_, **__: True)
    backbone = AutoBackbone.from_pretrained(str(written))
    assert type(backbone) is ConvNextV2Backbone
    assert (backbone.out_features, backbone.channels) == (["stage1", "stage2", "stage3", "stage4"], list(DIMS))
    with torch.inference_mode():
        assert difference(list(backbone(photographs).feature_maps), BACKBONE.expected(network, photographs)) < 1e-5


def openmmlab_names() -> dict[str, str]:
    """Of the parameters of mmpretrain 1.2.0's ConvNeXt with a block per stage, and timm's for the same."""
    names = {f"downsample_layers.0.{layer}": f"stem.{layer}" for layer in (0, 1)}
    for stage in range(4):
        if stage:
            names |= {f"downsample_layers.{stage}.{k}": f"stages.{stage}.downsample.{k}" for k in (0, 1)}
        ours, theirs = f"stages.{stage}.blocks.0", f"stages.{stage}.0"
        names |= {f"{theirs}.depthwise_conv": f"{ours}.conv_dw", f"{theirs}.norm": f"{ours}.norm"}
        names |= {f"{theirs}.pointwise_conv{k}": f"{ours}.mlp.fc{k}" for k in (1, 2)}
    names = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in names.items() for kind in ("weight", "bias")}
    for stage in range(4):
        grn = f"stages.{stage}.blocks.0.mlp.grn"
        names |= {f"stages.{stage}.0.grn.gamma": f"{grn}.weight", f"stages.{stage}.0.grn.beta": f"{grn}.bias"}
    return names


def test_openmmlab_weights(network: Trained, written: Path) -> None:
    weights, ours = torch.load(written / "openmmlab.pth")["state_dict"], network.net.state_dict()
    names = openmmlab_names()
    norms = {f"norm{stage}.{kind}" for stage in range(4) for kind in ("weight", "bias")}
    assert weights.keys() == names.keys() | norms
    for name, timm in names.items():
        assert torch.equal(weights[name], ours[timm]), name


def test_openmmlab_computes_the_same(network: Trained, written: Path, photographs: Tensor) -> None:
    backbones = pytest.importorskip("mmpretrain.models.backbones", reason="mmpretrain is not installed")
    (snippet,) = (code for title, code in SNIPPETS if title == "OpenMMLab")
    options = openmmlab_model(snippet)["backbone"]
    assert (options.pop("type"), options.pop("_delete_")) == ("mmpretrain.ConvNeXt", True)
    options |= {"arch": {"depths": list(DEPTHS), "channels": list(DIMS)}}
    options["init_cfg"]["checkpoint"] = str(written / "openmmlab.pth")
    backbone = backbones.ConvNeXt(**options)
    backbone.init_weights()
    backbone.eval()
    with torch.inference_mode():
        assert difference(list(backbone(photographs)), BACKBONE.expected(network, photographs)) < 1e-5


def test_refuses_a_network_without_grn(randomise: Randomise, tmp_path: Path) -> None:
    network = trained(randomise(micro_net(use_grn=False)), tmp_path)
    said = refusal(lambda: BACKBONE.check(network))
    assert "net.pth has no GRN layers" in said
    assert "use to=timm" in said


def test_says_what_to_install(network: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert 'pip install "fcmae[export]"' in refusal(lambda: BACKBONE.check(network))


def test_usage(network: Trained, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = BACKBONE.usage("micro-backbone", network)
    assert not imported(lines) & {"fcmae"}
    monkeypatch.chdir(written.parent)
    exec(lines, names := {})
    assert difference(list(names["maps"]), BACKBONE.expected(network, names["images"])) < 1e-5


# The page


def imported(code: str) -> set[str]:
    """The packages that it imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    return found


def openmmlab_model(snippet: str) -> dict[str, Any]:
    exec(snippet, names := {})
    return names["model"]


@pytest.fixture
def run(network: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs the snippet of a section beside exports of the network, with other sizes of pictures."""
    for conversion, name in ((Timm(), "tiny-timm"), (BACKBONE, "tiny-backbone")):
        conversion.write(network, made(tmp_path / name))
    monkeypatch.chdir(tmp_path)

    def run(section: str, sizes: dict[str, str]) -> dict[str, Any]:
        (code,) = (code for title, code in SNIPPETS if title == section)
        assert not imported(code) & {"fcmae"}
        for size, smaller in sizes.items():
            assert size in code
            code = code.replace(size, smaller)
        exec(code, names := {"__name__": section})
        return names

    return run


def stages(network: Trained, images: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return network.net.forward_intermediates(images, intermediates_only=True)


def trains(net: nn.Module) -> bool:
    """Whether every parameter has got a gradient."""
    return all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


def test_the_page_has_these_snippets() -> None:
    assert [title for title, _ in SNIPPETS] == [
        "timm",
        "transformers",
        "torchvision",
        "segmentation-models-pytorch",
        "OpenMMLab",
    ]


def test_timm(run: Any, network: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("timm", {})
    assert capsys.readouterr().out == f"{list(DIMS)} [4, 8, 16, 32]\n"
    assert difference(names["maps"], stages(network, names["images"])) < 1e-5


def test_transformers(run: Any, network: Trained) -> None:
    names = run("transformers", {"512": "64"})
    assert difference(list(names["maps"]), BACKBONE.expected(network, names["images"])) < 1e-5
    assert trains(names["net"].backbone)


def test_torchvision(run: Any, network: Trained) -> None:
    names = run("torchvision", {"800": "96", "1333": "128"})
    net, images = names["net"].eval(), torch.randn(1, 3, 96, 128)
    assert trains(net.backbone)
    assert difference(net.backbone.body(images), stages(network, images)) < 1e-5
    assert (tuple(net.transform.image_mean), tuple(net.transform.image_std)) == (MEAN, STD)
    (found,) = net([torch.rand(3, 480, 640)])
    assert found.keys() == {"boxes", "labels", "scores", "masks"}


def test_segmentation_models_pytorch(run: Any, network: Trained) -> None:
    names = run("segmentation-models-pytorch", {"512": "64"})
    assert trains(names["net"].encoder)
    features = names["net"].encoder.eval()(images := torch.randn(1, 3, 64, 96))
    assert difference(features[-4:], stages(network, images)) < 1e-5


def test_openmmlab(written: Path) -> None:
    (snippet,) = (code for title, code in SNIPPETS if title == "OpenMMLab")
    model = openmmlab_model(snippet)
    assert Path(model["backbone"]["init_cfg"]["checkpoint"]).name in {file.name for file in written.iterdir()}
    net = create_convnext(model["backbone"]["arch"], depths=None, dims=None, in_chans=3)
    assert model["neck"]["in_channels"] == [stage["num_chs"] for stage in net.feature_info]
