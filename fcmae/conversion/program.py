"""torch.export: the network as a program of tensor operations, which PyTorch runs without timm and without our code."""

from pathlib import Path
from typing import ClassVar

import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from torch.export import Dim

from fcmae.checkpoints.names import STEM
from fcmae.conversion.conversion import Conversion
from fcmae.conversion.picture_lines import imports, picture_lines
from fcmae.errors import UserError
from fcmae.files import atomic_writer
from fcmae.inference.trained import Trained

_LEAST = 64
"""Pixels per side: torch.export tells dimensions of one from others, and with less the last features are one wide."""


class Computation(nn.Module):
    """What an exported network computes: logits, or the last features where it has no classifier.

    Args:
        net: the network, in evaluation mode.
    """

    def __init__(self, net: ConvNeXt) -> None:
        super().__init__()
        self.net = net
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) -> (B, classes) or (B, C4, H/32, W/32)."""
        logits_or_features: Tensor = self.net(images) if self.net.num_classes else self.net.forward_features(images)
        return logits_or_features

    def example(self) -> Tensor:
        """Images to trace it with; two, since a dimension of one would be taken for a constant."""
        return torch.zeros(2, self.net.state_dict()[STEM].shape[1], 128, 96)


def free_dimensions(least: int) -> tuple[dict[int, Dim]]:
    """What `torch.export` is to leave open of `images`: how many there are, height and width from `least` pixels."""
    return ({0: Dim("batch", min=1), 2: Dim("height", min=least), 3: Dim("width", min=least)},)


class Program(Conversion):
    """`model.pt2`, for torch alone.

    Loading one unpickles nothing of ours: its weights lie in it as bytes and its graph as JSON, and only the example
    input is a pickle, which `torch.export.load` reads with `weights_only=True`. That is no promise about files of
    others: `torch.export.load` unpickles what a file marks as pickled, or what it cannot read in the safe way (PyTorch
    2.15), so load none that you do not trust.
    """

    library: ClassVar[str] = "torch"

    def check(self, trained: Trained) -> None:
        """torch.export cannot leave the size of small images open.

        Raises:
            UserError: the network is for smaller ones.
        """
        size = list(trained.preparation.image_size)
        if min(size) < _LEAST:
            raise UserError(
                f"image_size={size} is too small for to=torch, whose programs take images from {_LEAST} px per side: "
                "use to=onnx, or a larger image_size"
            )

    def write(self, trained: Trained, folder: Path) -> None:
        """`model.pt2`, for any number of images of any size from 64 px per side."""
        computation = Computation(trained.net)
        program = torch.export.export(computation, (computation.example(),), dynamic_shapes=free_dimensions(_LEAST))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # tells the folders of this machine
        with atomic_writer(folder / "model.pt2") as file:
            torch.export.save(program, file)

    @torch.inference_mode()
    def outputs(self, folder: Path, images: Tensor) -> list[Tensor]:
        """Of the program."""
        return [torch.export.load(folder / "model.pt2").module()(images)]

    def usage(self, name: str, trained: Trained) -> str:
        """With torch, numpy and Pillow."""
        channels = trained.preparation.in_chans
        return "\n".join(
            [
                *imports(trained.preparation, "torch"),
                "",
                f'net = torch.export.load("{name}/model.pt2").module()',
                *picture_lines(trained.preparation),
                f"# images: normalised, float32 (B, {channels}, H, W); any B, and any H and W from {_LEAST} px",
                "with torch.inference_mode():",
                f"    {'logits' if trained.class_names else 'features'} = net(torch.from_numpy(images))",
            ]
        )
