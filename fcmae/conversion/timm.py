"""timm's own form, as its `create_model("local-dir:...")` and `create_model("hf-hub:...")` read it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from safetensors.torch import save
from timm.models import PretrainedCfg
from torch import Tensor

from fcmae.checkpoints.names import STEM, Size, has_grn
from fcmae.conversion.conversion import Conversion
from fcmae.conversion.picture_lines import opened
from fcmae.files import atomic_writer, write_text
from fcmae.inference.trained import Trained


def architecture(weights: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """timm's name for the network of these weights, and what else `create_model` needs but the number of classes."""
    size, grn, in_chans = Size.of(weights), has_grn(weights), weights[STEM].shape[1]
    channels = {} if in_chans == 3 else {"in_chans": in_chans}
    if size.name != "custom" and grn:
        return f"convnextv2_{size.name}", channels
    return "convnextv2_tiny", {"depths": list(size.depths), "dims": list(size.dims), "use_grn": grn, **channels}


class Timm(Conversion):
    """Weights and `config.json` for timm; transformers' `AutoModel` loads them too, where timm is installed.

    timm's own `save_for_hf` is not used: it takes the description of the authors' weights for ours, their licence,
    address and tag, and writes `num_classes` where `AutoModel` cannot have it.
    """

    library: ClassVar[str] = "timm"

    def check(self, trained: Trained) -> None:
        """timm holds whatever we train."""

    def write(self, trained: Trained, folder: Path) -> None:
        """`model.safetensors`, in the shapes of timm's architecture of that name, and `config.json`."""
        weights, classes = trained.net.state_dict(), trained.net.num_classes
        name, options = architecture(weights)
        # The smaller sizes have 1x1 convolutions in timm where ours have matrices, of the same numbers.
        theirs = timm.create_model(name, num_classes=classes, **options).state_dict()
        weights = {key: value.reshape(theirs[key].shape).contiguous() for key, value in weights.items()}
        with atomic_writer(folder / "model.safetensors") as file:
            file.write(save(weights, metadata={"format": "pt"}))
        config = {
            "architecture": name,
            "num_classes": classes,
            "num_features": trained.net.num_features,
            **({"label_names": list(trained.class_names)} if trained.class_names else {}),
            **({"model_args": options} if options else {}),
            "pretrained_cfg": _pretrained_cfg(trained).to_dict(),
        }
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")

    @torch.inference_mode()
    def outputs(self, folder: Path, images: Tensor) -> list[Tensor]:
        """Of the network that timm's `create_model` makes of the folder."""
        net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        return [net(images) if net.num_classes else net.forward_features(images)]

    def usage(self, name: str, trained: Trained) -> str:
        """Two words with a slash between them are taken for a repository of the hub, all else for a folder."""
        source = "hf-hub" if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) else "local-dir"
        model = f'net = timm.create_model("{source}:{name}", pretrained=True).eval()'
        (height, width), channels = trained.preparation.image_size, trained.preparation.in_chans
        image = opened(trained.preparation)
        if image:
            lines = ["import timm", "import torch", "from PIL import Image", "", model]
            lines.append("transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))")
            lines.append(f"images = transform({image})[None]")
        else:
            lines = ["import timm", "import torch", "", model]
            lines.append(f"pixels = torch.zeros(1, {channels}, {height}, {width})  # your image's, in [0, 1]")
            lines.append(
                'mean, std = (torch.tensor(net.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))'
            )
            lines.append("images = (pixels - mean) / std")
        lines.append("with torch.inference_mode():")
        if not trained.class_names:
            lines.append("    features = net.forward_features(images)")
        else:
            lines += ["    logits = net(images)", 'print(net.pretrained_cfg["label_names"][logits.argmax()])']
        return "\n".join(lines)


def _pretrained_cfg(trained: Trained) -> PretrainedCfg:
    """What timm knows of weights, without where to find them, which it fills in itself."""
    preparation = trained.preparation
    height, width = preparation.image_size
    share = preparation.crop_share
    tag = "fcmae_own_ft" if trained.class_names else "fcmae_own"  # no tag of the authors' weights
    return PretrainedCfg(
        tag=tag if trained.source.ours else None,
        num_classes=trained.net.num_classes,
        input_size=(preparation.in_chans, height, width),
        pool_size=(height // 32, width // 32),
        interpolation="bicubic",
        crop_pct=share or 1.0,
        crop_mode="center" if share else "squash",
        mean=preparation.mean,
        std=preparation.std,
        # Named, timm would adapt it from three channels, and where it cannot leave it as it was initialised.
        first_conv="stem.0" if preparation.in_chans == 3 else None,
        classifier="head.fc",
        license=trained.source.license,
    )
