"""What is handed out runs where this package is not installed, by the very lines of its model card."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from clean_environment import CleanEnvironment
from test_export_timm import Fill, photographs, trained

from fcmae.conversion.conversion import Conversion
from fcmae.conversion.hf import HuggingFace
from fcmae.conversion.official import Official
from fcmae.conversion.onnx import Onnx
from fcmae.conversion.program import Program
from fcmae.conversion.timm import Timm
from fcmae.data.picture import Decoded

OURS = ("fcmae", "lightning", "pytorch_lightning", "hydra", "omegaconf", "pytest")
ENVIRONMENTS = {  # what is installed, and what must not be there
    "timm": (["timm", "pillow"], (*OURS, "transformers", "onnxruntime")),
    "transformers": (["transformers", "torch", "torchvision", "pillow"], (*OURS, "timm", "onnxruntime")),
    "onnxruntime": (["onnxruntime", "pillow"], (*OURS, "timm", "transformers", "torch", "onnx")),
    "torch": (["torch", "numpy", "pillow"], (*OURS, "timm", "transformers", "torchvision", "onnxruntime")),
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], CleanEnvironment]:
    """Each made once, when it is first asked for."""
    made: dict[str, CleanEnvironment] = {}

    def make(name: str) -> CleanEnvironment:
        if name not in made:
            packages, lacking = ENVIRONMENTS[name]
            folder = tmp_path_factory.mktemp("clean")
            made[name] = CleanEnvironment(folder / name, packages)
            made[name].lacks(folder, *lacking)
        return made[name]

    return make


# Where a card leaves everything to a pipeline: what it does, taken apart.
PIPELINE = """
import torch
from PIL import Image
image = Image.open("image.jpg")
images = classifier.image_processor(image, return_tensors="pt").pixel_values
with torch.inference_mode():
    outputs = classifier.model(images).logits
"""
SAVE = "\nimport numpy\nnumpy.save('images.npy', images)\nnumpy.save('result.npy', {result})\n"


@pytest.mark.parametrize(
    ("conversion", "name"),
    [
        (Timm(), "timm"),
        (Official(), "timm"),
        (Onnx(), "onnxruntime"),
        pytest.param(Program(), "torch", marks=pytest.mark.slow),
        (HuggingFace(), "transformers"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_lines_of_the_card(
    conversion: Conversion,
    name: str,
    environment: Callable[[str], CleanEnvironment],
    randomise: Fill,
    tmp_path: Path,
) -> None:
    """A classifier's and an encoder's, on a photograph; then the results against ours."""
    photograph, written, source = photographs()[1], {}, "import os\n"
    for kind, classes in (("encoder", 0), ("classifier", 5)):
        folder = tmp_path / kind
        written[kind] = ours = trained(folder, randomise, classes=classes, image_size=[128, 128])
        (folder / "out").mkdir()
        conversion.check(ours)
        conversion.write(ours, folder / "out")
        photograph.save(folder / "image.jpg", format="PNG")
        lines = conversion.usage("./out", ours)
        result = "outputs" if name == "transformers" else "logits" if classes else "features"
        source += f"os.chdir({str(folder)!r})\n{lines}\n"
        source += PIPELINE * ("pipeline(" in lines) + SAVE.format(result=result)
    environment(name).run(source, tmp_path)
    for kind, ours in written.items():
        images, found = (torch.from_numpy(np.load(tmp_path / kind / f"{part}.npy")) for part in ("images", "result"))
        expected = conversion.expected(ours, images)[0]
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
        assert expected.std() > 0.01
        prepared = ours.preparation.normalization()(ours.preparation.transform()(Decoded(photograph))[None])
        nearly = 0.05 if name == "transformers" else 1e-6  # it resizes with torchvision, not as PIL does
        assert (images - prepared).abs().mean() < nearly


def test_a_clean_environment_is_clean(environment: Callable[[str], CleanEnvironment], tmp_path: Path) -> None:
    """Or the tests above would show nothing."""
    clean = environment("timm")
    with pytest.raises(AssertionError, match="No module named 'fcmae'"):
        clean.run("import fcmae", tmp_path)
    with pytest.raises(AssertionError):
        clean.lacks(tmp_path, "timm")
    assert {"timm", "torch", "safetensors", "pyyaml"} <= clean.packages
    assert str(Path(__file__).parent) not in clean.run("import sys; print(sys.path)", tmp_path)
