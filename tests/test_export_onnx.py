"""Networks for onnxruntime and for torch alone, as graph and as program: they compute the same at every size."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from test_export_timm import PREPARATIONS, Fill, photographs, prepared, trained
from test_export_timm import out as out
from torch import Tensor

from fcmae import UserError
from fcmae.conversion import onnx as onnx_conversion
from fcmae.conversion.onnx import Onnx
from fcmae.conversion.picture_lines import imports, picture_lines
from fcmae.conversion.program import Program
from fcmae.data.picture import Decoded

Conversions = Onnx | Program
SHAPES = [(1, 64, 64), (3, 160, 96), (2, 100, 75), (1, 67, 384)]
BOTH = pytest.mark.parametrize("conversion", [Onnx(), Program()], ids=lambda conversion: type(conversion).__name__)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest value if that is more than one."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / max(1, expected.abs().max()))


def check_no_places(content: bytes) -> None:
    """The exporters would write down the lines of code that every operation comes from, with their folders."""
    for place in (Path(timm.__file__).parent, Path(onnx_conversion.__file__).parent, Path.home()):
        assert str(place).encode() not in content
    assert b".py" not in content


@BOTH
@pytest.mark.parametrize(("channels", "classes"), [(3, 5), (13, 0)])
def test_every_size_and_number(
    conversion: Conversions, channels: int, classes: int, randomise: Fill, out: Path, capfd: pytest.CaptureFixture
) -> None:
    ours = trained(out.parent, randomise, channels=channels, classes=classes)
    conversion.check(ours)
    conversion.write(ours, out)
    file, found = {Onnx: "model.onnx", Program: "model.pt2"}[type(conversion)], {path.name for path in out.iterdir()}
    assert found == {file}
    outputs = []
    least = [(1, 32, 32), (3, 32, 96)] if file == "model.onnx" else []
    for count, height, width in [*SHAPES, *least]:
        images = torch.randn(count, channels, height, width)
        (expected,), (found_there,) = conversion.expected(ours, images), conversion.outputs(out, images)
        assert difference(found_there, expected) <= 1e-5
        assert len(expected) == count
        outputs.append(found_there)
    assert outputs[0].std() > 0.01
    images = prepared(ours)
    assert difference(conversion.outputs(out, images)[0], conversion.expected(ours, images)[0]) <= 1e-5
    assert capfd.readouterr() == ("", "")  # nobody wants to read what an exporter thinks
    check_no_places((out / file).read_bytes())
    with torch.no_grad():  # or the comparison could not fail
        ours.net.stages[2].blocks[0].mlp.grn.weight[0] += 0.5
    assert difference(conversion.outputs(out, images)[0], conversion.expected(ours, images)[0]) > 1e-5


@pytest.mark.slow
@BOTH
def test_a_published_size(conversion: Conversions, randomise: Fill, out: Path) -> None:
    ours = trained(out.parent, randomise, size="atto")
    conversion.write(ours, out)
    images = prepared(ours)
    assert difference(conversion.outputs(out, images)[0], conversion.expected(ours, images)[0]) <= 1e-5


def test_what_an_onnx_file_says(randomise: Fill, out: Path) -> None:
    ours = trained(out.parent, randomise, image_size=[96, 64])
    Onnx().write(ours, out)
    model = onnx.load(out / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    (given,), (result,) = model.graph.input, model.graph.output
    dimensions = [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]
    assert (given.name, dimensions) == ("images", ["batch", 3, "height", "width"])
    assert (result.name, result.type.tensor_type.shape.dim[0].dim_param) == ("logits", "batch")
    said = onnxruntime.InferenceSession(out / "model.onnx").get_modelmeta().custom_metadata_map
    assert {key: json.loads(value) for key, value in said.items()} == {
        "mean": list(ours.preparation.mean),
        "std": list(ours.preparation.std),
        "image_size": [96, 64],
        "crop_pct": 0.875,
        "class_names": [f"class {number}" for number in range(5)],
        "multi_label": False,
    }


def test_weights_too_large_for_one_file_lie_beside_it(
    randomise: Fill, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_conversion, "_MOST_BYTES", 1000)
    ours = trained(out.parent, randomise)
    Onnx().write(ours, out)
    assert {path.name for path in out.iterdir()} == {"model.onnx", "model.onnx.data"}
    moved = out.rename(out.with_name("moved"))
    images = prepared(ours)
    assert difference(Onnx().outputs(moved, images)[0], Onnx().expected(ours, images)[0]) <= 1e-5


@pytest.mark.slow
@BOTH
def test_the_largest_size(conversion: Conversions, randomise: Fill, out: Path) -> None:
    ours = trained(out.parent, randomise, size="huge")
    conversion.write(ours, out)
    images = prepared(ours)[:1]
    assert difference(conversion.outputs(out, images)[0], conversion.expected(ours, images)[0]) <= 1e-5
    assert (out / "model.onnx.data").exists() == isinstance(conversion, Onnx)


def test_a_program_unpickles_nothing(randomise: Fill, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its docstring says so; torch's loader takes `weights_only=False` only for what a file marks as pickled."""
    ours = trained(out.parent, randomise)
    Program().write(ours, out)
    load: Callable[..., Any] = torch.load
    seen = []

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append(options["weights_only"])
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", watched)
    Program().outputs(out, prepared(ours))
    assert set(seen) == {True}


def test_a_program_takes_no_small_images(randomise: Fill, out: Path) -> None:
    ours = trained(out.parent, randomise, image_size=[32, 64])
    with pytest.raises(UserError) as caught:
        Program().check(ours)
    assert str(caught.value).startswith("image_size=[32, 64] is too small for to=torch, whose programs take images")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_what_onnx_needs(missing: str, randomise: Fill, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(UserError) as caught:
        Onnx().check(trained(out.parent, randomise))
    assert str(caught.value) == f'to=onnx needs {missing}: pip install "fcmae[export]"'


@pytest.mark.parametrize(("image_size", "crop_pct"), PREPARATIONS)
@pytest.mark.parametrize("channels", [1, 3, 13])
def test_the_lines_of_a_card_prepare_as_training_did(
    image_size: tuple[int, int],
    crop_pct: Any,
    channels: int,
    randomise: Fill,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ours = trained(tmp_path, randomise, channels=channels, image_size=list(image_size), crop_pct=crop_pct)
    preparation = ours.preparation
    for photograph in photographs()[:1] if channels == 13 else photographs():
        image = photograph.convert("L" if channels == 1 else "RGB")
        image.save("image.jpg", format="PNG")
        pixels = preparation.transform()(Decoded(image)) if channels < 13 else torch.zeros(13, *image_size)
        expected = preparation.normalization()(pixels[None])
        names: dict[str, Any] = {}
        exec("\n".join([*imports(preparation), *picture_lines(preparation)]), names)
        assert names["images"].dtype == np.float32
        assert np.abs(names["images"] - expected.numpy()).max() < 1e-6
