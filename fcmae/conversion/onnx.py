"""ONNX: the network as a graph that onnxruntime and most other runtimes execute."""

import importlib.util
import json
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from fcmae.conversion.conversion import Conversion
from fcmae.conversion.picture_lines import imports, picture_lines
from fcmae.conversion.program import Computation, free_dimensions
from fcmae.errors import UserError
from fcmae.inference.trained import Trained

_OPSET = 18
"""The first with LayerNormalization that torch's exporter writes; onnxruntime reads it from 1.14 on."""

_MOST_BYTES = 2**31 - 2**26
"""Of weights in one file: protobuf holds 2 GiB, of which the graph needs some."""

_NEEDED = ("onnx", "onnxscript", "onnxruntime")


class Onnx(Conversion):
    """`model.onnx`, and `model.onnx.data` beside it where the weights are larger than an ONNX file may be.

    Input `images`, normalised; output `logits`, or `features` without a classifier. How pictures are prepared and
    what the classes are called stands in the file's `metadata_props`, as JSON.
    """

    library: ClassVar[str] = "onnxruntime"

    def check(self, trained: Trained) -> None:
        """ONNX holds whatever we train, if its packages are installed.

        Raises:
            UserError: they are not.
        """
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f'to=onnx needs {" and ".join(missing)}: pip install "fcmae[export]"')

    def write(self, trained: Trained, folder: Path) -> None:
        """`model.onnx`, for any number of images of any size from 32 px per side."""
        computation = Computation(trained.net)
        program = torch.onnx.export(
            computation,
            (computation.example(),),
            dynamo=True,
            dynamic_shapes=free_dimensions(32),
            input_names=["images"],
            output_names=["logits" if trained.class_names else "features"],
            opset_version=_OPSET,
            verbose=False,
        )
        assert program is not None
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # tells the folders of this machine
        program.model.metadata_props.update({key: json.dumps(value) for key, value in _about(trained).items()})
        size = sum(value.nbytes for value in trained.net.state_dict().values())
        program.save(folder / "model.onnx", external_data=size > _MOST_BYTES)

    def outputs(self, folder: Path, images: Tensor) -> list[Tensor]:
        """Of onnxruntime on the CPU."""
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        return [torch.from_numpy(values) for values in session.run(None, {"images": images.contiguous().numpy()})]

    def usage(self, name: str, trained: Trained) -> str:
        """With onnxruntime, numpy and Pillow."""
        result = "logits" if trained.class_names else "features"
        return "\n".join(
            [
                *imports(trained.preparation, "onnxruntime"),
                "",
                f'session = onnxruntime.InferenceSession("{name}/model.onnx")',
                *picture_lines(trained.preparation),
                f'({result},) = session.run(["{result}"], {{"images": images}})',
            ]
        )


def _about(trained: Trained) -> dict[str, object]:
    preparation = trained.preparation
    return {
        "mean": preparation.mean,
        "std": preparation.std,
        "image_size": preparation.image_size,
        "crop_pct": preparation.crop_share,
        **({"class_names": trained.class_names, "multi_label": trained.multi_label} if trained.class_names else {}),
    }
