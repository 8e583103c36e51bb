"""Backbones for detection and segmentation: the feature maps of four stages, for transformers and for OpenMMLab.

B images, Ci channels of stage i
"""

from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.checkpoints.names import HF_TO_TIMM, Size, has_grn, renamed, to_hf, to_official
from fcmae.conversion.conversion import Conversion
from fcmae.conversion.hf import check_transformers, without_bars
from fcmae.errors import UserError
from fcmae.files import atomic_writer
from fcmae.inference.trained import Trained

OPENMMLAB = "openmmlab.pth"
_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_EPS = 1e-6  # of every LayerNorm of a ConvNeXt


class Backbone(Conversion):
    """Four maps at strides 4, 8, 16 and 32, each behind a LayerNorm over channels, without a classifier.

    The heads of detectors expect such norms (the authors' detection code for ConvNeXt; mmpretrain's `norm0` to
    `norm3`). Ours begin as ones and zeros, for pre-training and classification have none.
    """

    library: ClassVar[str] = "transformers"
    keeps_classifier: ClassVar[bool] = False

    def check(self, trained: Trained) -> None:
        """transformers' ConvNextV2 always has GRN.

        Raises:
            UserError: the network has none, or transformers is not installed.
        """
        check_transformers("backbone")
        if not has_grn(trained.net.state_dict()):
            raise UserError(
                f"{trained.source.file} has no GRN layers, which transformers' ConvNextV2Backbone cannot do without: "
                "use to=timm, and features_only=True when you load it"
            )

    def write(self, trained: Trained, folder: Path) -> None:
        """`model.safetensors` and `config.json` for AutoBackbone, `openmmlab.pth` for mmpretrain's ConvNeXt."""
        import transformers

        net = trained.net
        weights = {name: value for name, value in net.state_dict().items() if not name.startswith("head.")}
        size, height, width = Size.of(weights), *trained.preparation.image_size
        config = transformers.ConvNextV2Config(
            num_channels=trained.preparation.in_chans,
            depths=list(size.depths),
            hidden_sizes=list(size.dims),
            image_size=height if height == width else [height, width],
            layer_norm_eps=_EPS,
            out_features=_STAGES,  # type: ignore[call-arg]
        )
        backbone = transformers.ConvNextV2Backbone(config)
        renamed = {name.removeprefix("convnextv2."): value for name, value in to_hf(weights).items()}
        norms = _norms([f"hidden_states_norms.{stage}" for stage in _STAGES], size)
        backbone.load_state_dict(renamed | norms)
        with without_bars():
            backbone.save_pretrained(folder)
        with atomic_writer(folder / OPENMMLAB) as file:
            norms = _norms([f"norm{stage}" for stage in range(4)], size)
            torch.save({"state_dict": _to_openmmlab(weights) | norms}, file)

    @torch.inference_mode()
    def outputs(self, folder: Path, images: Tensor) -> list[Tensor]:
        """What transformers computes. OpenMMLab is not asked: `openmmlab.pth` has to hold the same weights.

        Raises:
            UserError: it has not.
        """
        import transformers

        # AutoBackbone of transformers 5 asks the hub first and takes no folder.
        with without_bars():
            backbone = transformers.ConvNextV2Backbone.from_pretrained(folder, local_files_only=True)
        theirs = torch.load(folder / OPENMMLAB, weights_only=True, mmap=True)["state_dict"]
        state = {name: value for name, value in backbone.state_dict().items() if not name.startswith("hidden_")}
        weights = renamed({f"convnextv2.{name}": value for name, value in state.items()}, HF_TO_TIMM)
        if not all(torch.equal(theirs[name], value) for name, value in _to_openmmlab(weights).items()):
            raise UserError(f"{OPENMMLAB} did not come out as the rest: nothing is left of the export")
        return list(backbone(images).feature_maps)

    @torch.inference_mode()
    def expected(self, trained: Trained, images: Tensor) -> list[Tensor]:
        """The outputs of timm's stages behind a LayerNorm: four of (B, Ci, H / 4, W / 4) to (B, Ci, H / 32, W / 32)."""
        maps = trained.net.forward_intermediates(images, intermediates_only=True)
        return [
            F.layer_norm(map.permute(0, 2, 3, 1), map.shape[1:2], eps=_EPS).permute(0, 3, 1, 2)  # over Ci
            for map in maps
        ]

    def usage(self, name: str, trained: Trained) -> str:
        """With transformers; docs/backbones.md has detectors and segmenters around it."""
        channels = ", ".join(map(str, Size.of(trained.net.state_dict()).dims))
        return "\n".join(
            [
                "import torch",
                "from transformers import ConvNextV2Backbone",
                "",
                f'backbone = ConvNextV2Backbone.from_pretrained("{name}")',
                f"images = torch.zeros(1, {trained.preparation.in_chans}, 512, 512)  # yours, normalised",
                "with torch.inference_mode():",
                f"    maps = backbone(images).feature_maps  # {channels} channels at strides 4, 8, 16, 32",
            ]
        )


def _norms(names: list[str], size: Size) -> dict[str, Tensor]:
    """A LayerNorm per stage as it begins."""
    norms: dict[str, Tensor] = {}
    for name, channels in zip(names, size.dims, strict=True):
        norms |= {f"{name}.weight": torch.ones(channels), f"{name}.bias": torch.zeros(channels)}
    return norms


def _to_openmmlab(timm: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's weights in the names and shapes of mmpretrain's ConvNeXt (mmpretrain/models/backbones/convnext.py).

    They are the authors' but for the words for depthwise and pointwise, and GRN has one axis.
    """
    return {
        name.replace("dwconv", "depthwise_conv").replace("pwconv", "pointwise_conv"): (
            value.flatten() if ".grn." in name else value
        )
        for name, value in to_official(timm).items()
    }
