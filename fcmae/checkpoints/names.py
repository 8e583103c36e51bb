"""How weights of a ConvNeXt V2 are told apart: by the names of their layers and by the size of the network."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fcmae.errors import UserError

STEM = "stem.0.weight"

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
_STANDS_FOR = {"d": "[1-3]", "i": "[0-3]", "j": "[0-9]+", "k": "[01]", "p": "weight|bias"}

Layout = Literal["timm", "official", "minkowski"]

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
    return _translate(timm, {theirs: official for official, theirs in OFFICIAL_TO_TIMM.items()})


def to_timm(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' dense weights in timm's names; one that is not in the table keeps its own."""
    return {
        timm_name(name) or name: value.reshape(-1) if ".grn." in name else value for name, value in official.items()
    }


def layout(names: Iterable[str]) -> Layout | None:
    """Whose names these are; None if they are none of a ConvNeXt.

    `official` is the authors' dense model, `minkowski` their sparse one of pre-training. Complete they need not be.
    """
    names = set(names)
    if any(re.search(r"(^|\.)dwconv\.kernel$|\.\d+\.ln\.weight$|\.pwconv\d\.linear\.", name) for name in names):
        return "minkowski"
    if STEM in names and any(name.endswith(".conv_dw.weight") for name in names):
        return "timm"
    if "downsample_layers.0.0.weight" in names and any(name.endswith(".dwconv.weight") for name in names):
        return "official"
    return None


def has_grn(weights: Iterable[str]) -> bool:
    """Whether a network with these weights, in timm's names, has GRN layers; ours may be made without."""
    return any(".mlp.grn." in name for name in weights)


def in_timm_names(state: Any, file: Path) -> tuple[dict[str, Tensor], Layout]:
    """A state dict of a ConvNeXt V2 in timm's names, and the layout that it was in.

    Args:
        state: what `file` has in the place of a state dict; names may begin with `module.` or `_orig_mod.`.
        file: named in the error.

    Raises:
        UserError: it is no state dict, or of another network.
    """
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())
    ):
        raise UserError(f"{file} holds no state dict, names with a tensor each: give one of a ConvNeXt V2")
    weights = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in state.items()}
    found = layout(weights)
    if found == "minkowski":
        raise UserError(
            f"{file} holds the authors' pre-training model as MinkowskiEngine has it, which is not read yet: "
            "give its encoder with dense layers, as the authors publish it"
        )
    if found is None:
        first = next(iter(weights))
        raise UserError(f"{file} is no ConvNeXt V2 in timm's or the authors' names (it has {first}): give another file")
    if found == "official":
        weights = to_timm(weights)
    if any(re.fullmatch(r"stages\.\d\.blocks\.\d+\.gamma", name) for name in weights):
        raise UserError(f"{file} holds a ConvNeXt of the first version, with layer scale: give a ConvNeXt V2")
    size = Size.of(weights)
    if 0 in (*size.depths, *size.dims) or weights[STEM].ndim != 4:
        raise UserError(f"{file} holds only part of a ConvNeXt V2, {size}: give one with four stages")
    return weights, found


def _translate(name: str, table: Mapping[str, str]) -> str | None:
    for ours, theirs in table.items():
        pattern = re.sub(r"\\{(.)\\}", lambda piece: f"(?P<{piece[1]}>{_STANDS_FOR[piece[1]]})", re.escape(ours))
        if found := re.fullmatch(pattern, name):
            return theirs.format(**found.groupdict())
    return None


def _published(depths: tuple[int, ...], width: int) -> Size:
    return Size(depths, (width, 2 * width, 4 * width, 8 * width))
