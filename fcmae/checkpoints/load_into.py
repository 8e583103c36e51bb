"""Weights into timm's ConvNeXt: what fits is loaded, what does not is named."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor

from fcmae.checkpoints.names import STEM, Size, has_grn
from fcmae.checkpoints.weights import Weights
from fcmae.errors import UserError

AdaptChannels = Literal["sum", "repeat"]

_MOST_NAMES = 20
_CLASSIFIER = ("head.fc.weight", "head.fc.bias")


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of a network's parameters and of a file's weights, by timm's names.

    Attributes:
        source: whose weights they are.
        loaded: parameters that hold the file's weights now.
        fresh: parameters that are as they were; none but the head's, unless the load was not strict.
        left_out: weights of the file that were not used; likewise.
        adapted: those of `loaded` that were fitted to another number of channels.
        in_chans: channels of an image: the file's, the network's.
        classes: the file's, the network's; 0 without classifier.
    """

    source: Weights
    loaded: tuple[str, ...]
    fresh: tuple[str, ...]
    left_out: tuple[str, ...]
    adapted: tuple[str, ...]
    in_chans: tuple[int, int]
    classes: tuple[int, int]

    def lines(self) -> list[str]:
        """The same for people, one line per part of the network."""
        return [*self.body_lines(), *self._head_lines()]

    def body_lines(self) -> list[str]:
        """Those of all but the head."""
        body = {what: [name for name in names if not name.startswith("head.")] for what, names in self._parts().items()}
        lines = [f"encoder: {len(body['loaded'])} tensors from {self.source.file} ({self.source.kind})"]
        if body["fresh"]:
            lines.append(f"encoder: {_first(body['fresh'])} new, not in the checkpoint or of another shape there")
        if body["left_out"]:
            lines.append(f"encoder: {_first(body['left_out'])} of the checkpoint not used")
        if self.source.ignored:
            lines.append(f"not needed: {_first(self.source.ignored)} of the checkpoint")
        if self.adapted:
            lines.append(f"first convolution: adapted from {self.in_chans[0]} channels to {self.in_chans[1]}")
        if self.source.license:
            lines.append(f"licence of {self.source.source}: {self.source.license}")
        return lines

    def _head_lines(self) -> list[str]:
        lines = ["final norm: new"] if "head.norm.weight" in self.fresh else []
        theirs, ours = self.classes
        there = f"the checkpoint's has {theirs}" if theirs else "the checkpoint has none"
        if _CLASSIFIER[0] in self.loaded:
            lines.append(f"classifier: {ours} classes, from the checkpoint")
        else:
            lines.append(f"classifier: {f'new, {ours} classes' if ours else 'none'} ({there})")
        return lines

    def _parts(self) -> dict[str, tuple[str, ...]]:
        return {"loaded": self.loaded, "fresh": self.fresh, "left_out": self.left_out}


def load_into(
    net: ConvNeXt,
    weights: Weights,
    *,
    adapt_in_chans: AdaptChannels | None = None,
    keep_head: bool = True,
    strict: bool = True,
) -> LoadReport:
    """Loads `weights` into timm's ConvNeXt, with 1x1 convolutions or matrices in its MLPs, all of it but the head.

    Args:
        net: with or without classifier; what the weights lack of its head stays as it is. On torch's meta device
            nothing is loaded, but all is checked.
        weights: of `read_weights`.
        adapt_in_chans: how to fit the first convolution to another number of channels, see `adapt_channels`; None
            refuses another number.
        keep_head: load the classifier if it has as many classes.
        strict: refuse whatever does not fit but the head; else it stays as it is, and the report names it.

    Raises:
        UserError: the weights are of another depth or width, of another number of channels, or do not fit otherwise,
            or `adapt_in_chans` is unknown. The network is as it was.
    """
    if adapt_in_chans not in (None, "sum", "repeat"):
        raise UserError(f"adapt_in_chans={adapt_in_chans!r} is unknown: use sum or repeat, or null to refuse")
    own, given, file = net.state_dict(), dict(weights.weights), weights.file
    in_chans = (given[STEM].shape[1], own[STEM].shape[1])
    if strict:
        _check_kind(file, given, own, in_chans=in_chans, adapt=adapt_in_chans is not None)
    adapted = in_chans[0] != in_chans[1] and adapt_in_chans is not None
    if adapted and adapt_in_chans is not None:
        given[STEM] = adapt_channels(given[STEM], in_chans[1], adapt_in_chans)
    fitting = {name: _reshaped(value, own[name].shape) for name, value in given.items() if name in own}
    differing = {name for name, value in fitting.items() if value.shape != own[name].shape}
    unwanted = {name for name in differing if not strict or name.startswith("head.")}
    if not keep_head or unwanted & {*_CLASSIFIER} or not fitting.keys() >= {*_CLASSIFIER}:
        unwanted |= {*_CLASSIFIER}
    fitting = {name: value for name, value in fitting.items() if name not in unwanted}
    fresh, left_out = own.keys() - fitting.keys(), given.keys() - fitting.keys()
    if strict:
        _check_all(file, missing=fresh, left_over=left_out, differing=differing & fitting.keys())
    elif not fitting:
        raise UserError(f"{file} fits the model nowhere, not even in part: give weights of a network like it")
    if not own[STEM].is_meta:
        net.load_state_dict(fitting, strict=False)
    return LoadReport(
        source=weights,
        loaded=tuple(fitting),
        fresh=tuple(name for name in own if name in fresh),
        left_out=tuple(name for name in given if name in left_out),
        adapted=(STEM,) if adapted else (),
        in_chans=in_chans,
        classes=(_classes(given), _classes(own)),
    )


def _check_kind(
    file: Path, given: dict[str, Tensor], own: dict[str, Tensor], *, in_chans: tuple[int, int], adapt: bool
) -> None:
    """Refuses weights of another size, kind of network or number of channels."""
    theirs, ours = Size.of(given), Size.of(own)
    if theirs != ours:
        raise UserError(f"{file} holds a ConvNeXt V2 {theirs}, the model is {ours}: use {theirs.options}")
    if has_grn(given) != has_grn(own):
        has, lacks = (file, "the model") if has_grn(given) else ("the model", file)
        raise UserError(f"{has} has GRN layers and {lacks} has none: use model.use_grn={str(has_grn(given)).lower()}")
    if in_chans[0] != in_chans[1] and not adapt:
        raise UserError(
            f"{file} is for images of {in_chans[0]} channels, the model takes {in_chans[1]}: "
            f"use data.in_chans={in_chans[0]}, or adapt_in_chans=sum or repeat"
        )


def adapt_channels(kernel: Tensor, channels: int, how: AdaptChannels) -> Tensor:
    """A convolution kernel for images of another number of channels: (D, C, k, k) -> (D, channels, k, k).

    With either, an image whose channels are all alike gives the response that it gave with C such channels: to 1 from
    3 channels, grey means what grey in colours meant. Alike *after* the normalisation by mean and deviation, that is.

    Args:
        kernel: of the first convolution.
        channels: of an image from now on.
        how: `sum`: every channel has the sum of the old kernels, divided by `channels`; they are told apart only once
            trained. `repeat`: the old kernels in turn (red, green, blue, red, ...), times C / channels. Where
            `channels` is no multiple of C some old kernels occur more often than others or not at all, and responses
            are kept only as far as the kernels are alike.
    """
    if how == "sum":
        return kernel.sum(1, keepdim=True).div(channels).repeat(1, channels, 1, 1)
    taken = torch.arange(channels, device=kernel.device) % kernel.shape[1]
    return kernel[:, taken] * (kernel.shape[1] / channels)


def _first(names: Sequence[str]) -> str:
    return f"{len(names)} tensors ({', '.join(names[:_MOST_NAMES])}{', ...' if len(names) > _MOST_NAMES else ''})"


def _reshaped(value: Tensor, shape: torch.Size) -> Tensor:
    """A matrix as a 1x1 convolution or the other way round, if that is what it takes."""
    same = value.shape[:2] == shape[:2] and {*value.shape[2:], *shape[2:]} <= {1}
    return value.reshape(shape) if same else value


def _check_all(file: Path, *, missing: set[str], left_over: set[str], differing: set[str]) -> None:
    found = {"missing": missing, "unknown": left_over, "of another shape": differing}
    bad = {what: sorted(n for n in names if not n.startswith("head.")) for what, names in found.items()}
    if any(bad.values()):
        told = ", ".join(f"{len(names)} {what} (first: {names[0]})" for what, names in bad.items() if names)
        raise UserError(
            f"{file} does not fit the model: of its weights {told}; give those of a plain ConvNeXt V2 "
            "(training can load what fits: strict=false)"
        )


def _classes(weights: Mapping[str, Tensor]) -> int:
    return len(weights[_CLASSIFIER[0]]) if _CLASSIFIER[0] in weights else 0
