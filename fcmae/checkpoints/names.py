"""How weights of a ConvNeXt V2 are told apart: by the names of their layers and by the size of the network."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

STEM = "stem.0.weight"
WEIGHT_FILES = (
    "model.safetensors",  # of fine-tuning, with the classifier, and of timm and transformers
    "encoder.safetensors",  # of pre-training
    "model.pth",  # in the authors' names
    "pytorch_model.bin",  # older ones of timm and transformers
)
"""In a folder or a repository: the first that is there."""

# The authors' names in their dense models -> timm's. d, i, j, k stand for numbers, p for weight or bias.
OFFICIAL_TO_TIMM = {
    "downsample_layers.0.{k}.{p}": "stem.{k}.{p}",
    "downsample_layers.{d}.{k}.{p}": "stages.{d}.downsample.{k}.{p}",
    "stages.{i}.{j}.dwconv.{p}": "stages.{i}.blocks.{j}.conv_dw.{p}",
    "stages.{i}.{j}.norm.{p}": "stages.{i}.blocks.{j}.norm.{p}",
    "stages.{i}.{j}.pwconv1.{p}": "stages.{i}.blocks.{j}.mlp.fc1.{p}",
    "stages.{i}.{j}.grn.gamma": "stages.{i}.blocks.{j}.mlp.grn.weight",  # (1, 1, 1, C) -> (C,)
    "stages.{i}.{j}.grn.beta": "stages.{i}.blocks.{j}.mlp.grn.bias",
    "stages.{i}.{j}.gamma": "stages.{i}.blocks.{j}.gamma",  # layer scale, which only the first version has
    "stages.{i}.{j}.pwconv2.{p}": "stages.{i}.blocks.{j}.mlp.fc2.{p}",
    "norm.{p}": "head.norm.{p}",
    "head.{p}": "head.fc.{p}",
}
# Those of transformers' ConvNextV2ForImageClassification -> timm's; GRN is (1, 1, 1, C) there too.
HF_TO_TIMM = {
    "convnextv2.embeddings.patch_embeddings.{p}": "stem.0.{p}",
    "convnextv2.embeddings.layernorm.{p}": "stem.1.{p}",
    "convnextv2.encoder.stages.{d}.downsampling_layer.{k}.{p}": "stages.{d}.downsample.{k}.{p}",
    "convnextv2.encoder.stages.{i}.layers.{j}.dwconv.{p}": "stages.{i}.blocks.{j}.conv_dw.{p}",
    "convnextv2.encoder.stages.{i}.layers.{j}.layernorm.{p}": "stages.{i}.blocks.{j}.norm.{p}",
    "convnextv2.encoder.stages.{i}.layers.{j}.pwconv1.{p}": "stages.{i}.blocks.{j}.mlp.fc1.{p}",
    "convnextv2.encoder.stages.{i}.layers.{j}.grn.{p}": "stages.{i}.blocks.{j}.mlp.grn.{p}",
    "convnextv2.encoder.stages.{i}.layers.{j}.pwconv2.{p}": "stages.{i}.blocks.{j}.mlp.fc2.{p}",
    "convnextv2.layernorm.{p}": "head.norm.{p}",
    "classifier.{p}": "head.fc.{p}",
}
# Those of the authors' decoder of pre-training -> those of ours.
DECODER_TO_OURS = {
    "decoder.{j}.dwconv.{p}": "blocks.{j}.conv_dw.{p}",
    "decoder.{j}.norm.{p}": "blocks.{j}.norm.{p}",
    "decoder.{j}.pwconv1.{p}": "blocks.{j}.mlp.fc1.{p}",
    "decoder.{j}.grn.gamma": "blocks.{j}.mlp.grn.weight",
    "decoder.{j}.grn.beta": "blocks.{j}.mlp.grn.bias",
    "decoder.{j}.pwconv2.{p}": "blocks.{j}.mlp.fc2.{p}",
    "proj.{p}": "proj.{p}",
    "pred.{p}": "pred.{p}",
    "mask_token": "mask_token",
}
_STANDS_FOR = {"d": "[1-3]", "i": "[0-3]", "j": "[0-9]+", "k": "[01]", "p": "weight|bias"}

# Depths, and the channels of the first stage, which double from stage to stage (paper appendix A; `small` is timm's).
_SIZES = {
    "atto": ((2, 2, 6, 2), 40),
    "femto": ((2, 2, 6, 2), 48),
    "pico": ((2, 2, 6, 2), 64),
    "nano": ((2, 2, 8, 2), 80),
    "tiny": ((3, 3, 9, 3), 96),
    "small": ((3, 3, 27, 3), 96),
    "base": ((3, 3, 27, 3), 128),
    "large": ((3, 3, 27, 3), 192),
    "huge": ((3, 3, 27, 3), 352),
}


@dataclass(frozen=True)
class Size:
    """Blocks and channels of the four stages; a stage that is not there has none."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> "Size":
        """The size of the network that has these weights, in timm's names."""
        depths, dims = [0] * 4, [0] * 4
        for name, value in weights.items():
            if found := re.fullmatch(r"stages\.([0-3])\.blocks\.([0-9]{1,4})\.conv_dw\.weight", name):
                stage, block = int(found[1]), int(found[2])
                depths[stage] = max(depths[stage], block + 1)
                dims[stage] = value.shape[0] if value.ndim else 0
        return cls(tuple(depths), tuple(dims))

    @property
    def name(self) -> str:
        """One of the published sizes, else `custom`."""
        return next((name for name, size in _SIZES.items() if _published(*size) == self), "custom")

    @property
    def options(self) -> str:
        """What asks for this size on the command line."""
        if self.name != "custom":
            return f"+model={self.name}"
        depths, dims = (str(list(values)).replace(" ", "") for values in (self.depths, self.dims))
        return f"+model=custom model.depths={depths} model.dims={dims}"

    def __str__(self) -> str:
        return f"{self.name} (depths {list(self.depths)}, dims {list(self.dims)})"


def timm_name(official: str) -> str | None:
    """timm's name for a parameter that has this name in the authors' dense models; None if it is none of theirs."""
    return _translate(official, OFFICIAL_TO_TIMM)


def official_name(timm: str) -> str | None:
    """The other way round."""
    return _translate(timm, _inverse(OFFICIAL_TO_TIMM))


def renamed(weights: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights of others in timm's names, or our decoder's, GRN (C,); one that is not in the table keeps its name."""
    names = {name: _translate(name, table) or name for name in weights}
    return {names[name]: value.reshape(-1) if ".grn." in name else value for name, value in weights.items()}


def to_official(timm: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's weights in the names and shapes of the authors' dense models."""
    return _for_others(timm, OFFICIAL_TO_TIMM)


def to_hf(timm: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's weights in the names and shapes of transformers' ConvNextV2ForImageClassification."""
    return _for_others(timm, HF_TO_TIMM)


def has_grn(weights: Iterable[str]) -> bool:
    """Whether a network with these weights, in timm's names, has GRN layers; ours may be made without."""
    return any(".mlp.grn." in name for name in weights)


def _for_others(timm: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    names = {name: _translate(name, _inverse(table)) for name in timm}
    unknown = [name for name, theirs in names.items() if theirs is None]
    assert not unknown, f"no ConvNeXt V2 in timm's names: {unknown[:3]}"

    def shaped(name: str, value: Tensor) -> Tensor:
        if ".mlp.grn." in name:
            return value.view(1, 1, 1, -1)
        return value.flatten(1) if ".mlp.fc" in name and value.ndim == 4 else value

    return {str(names[name]): shaped(name, value) for name, value in timm.items()}


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}


def _translate(name: str, table: Mapping[str, str]) -> str | None:
    for ours, theirs in table.items():
        pattern = re.sub(r"\\{(.)\\}", lambda piece: f"(?P<{piece[1]}>{_STANDS_FOR[piece[1]]})", re.escape(ours))
        if found := re.fullmatch(pattern, name):
            return theirs.format(**found.groupdict())
    return None


def _published(depths: tuple[int, ...], width: int) -> Size:
    return Size(depths, (width, 2 * width, 4 * width, 8 * width))
