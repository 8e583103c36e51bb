"""Whose state dict this is, and the same weights in timm's names: encoder, and decoder where there is one."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fcmae.checkpoints.names import DECODER_TO_OURS, HF_TO_TIMM, OFFICIAL_TO_TIMM, STEM, Size, renamed
from fcmae.errors import UserError

Layout = Literal["fcmae", "timm", "official", "minkowski", "hf"]

WRITTEN_BY: dict[Layout, str] = {
    "fcmae": "fcmae",
    "timm": "timm",
    "official": "the authors' dense model",
    "minkowski": "the authors' pre-training",
    "hf": "transformers",
}
CREATE_MODEL = "fcmae.models.create.create_model"
_OURS = "encoder.net."
_DECODER = r"mask_token|(proj|pred)\.(weight|bias)|blocks\.\d+\..+"
_HF_BODY = "convnextv2."


@dataclass(frozen=True)
class Found:
    """What a state dict holds of a ConvNeXt V2.

    Attributes:
        encoder: in timm's names.
        decoder: in the names of `fcmae.models.decoder.Decoder`, or whatever somebody's own has; empty if there is none.
        layout: whose names they were.
        ignored: names of weights that have no place in either, and need none.
    """

    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor]
    layout: Layout
    ignored: tuple[str, ...] = ()


def layout(names: Iterable[str]) -> Layout | None:
    """Whose names these are; None if they are none of a ConvNeXt.

    `official` is the authors' dense model, `minkowski` their sparse one of pre-training, `fcmae` our autoencoder.
    Complete they need not be.
    """
    names = set(names)
    if _OURS + STEM in names:  # before the others, as beside it there may be anybody's decoder
        return "fcmae"
    if any(re.search(r"(^|\.)dwconv\.kernel$|\.\d+\.ln\.weight$|\.pwconv\d\.linear\.", name) for name in names):
        return "minkowski"
    if any(name.removeprefix(_HF_BODY) == "embeddings.patch_embeddings.weight" for name in names):
        return "hf"
    if STEM in names and any(name.endswith(".conv_dw.weight") for name in names):
        return "timm"
    if "downsample_layers.0.0.weight" in names and any(name.endswith(".dwconv.weight") for name in names):
        return "official"
    return None


def find_weights(state: Any, file: Path, *, made_by: object = None) -> Found:
    """What a state dict in any of the known layouts holds.

    Args:
        state: what `file` has in the place of a state dict; names may begin with `module.` or `_orig_mod.`.
        file: named in the error.
        made_by: the `_target_` of the model, if the file tells. A decoder that `create_model` did not make, or, where
            nothing is told, that has other names than ours, is taken as it is.

    Raises:
        UserError: it is no state dict, of another network, or of one that cannot be.
    """
    weights = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in _tensors(state, file).items()}
    if len(weights) < len(state):
        raise UserError(f"{file} holds weights under two names that mean the same, such as x and module.x: keep one")
    whose = layout(weights)
    if whose is None:
        first = ", ".join(list(weights)[:3])
        raise UserError(
            f"{file} is no ConvNeXt V2 in the names of fcmae, timm, transformers or the authors: its {len(weights)} "
            f"weights begin with {first}; give another file"
        )
    found = _sorted_out(weights, whose)
    _check(found, file, known={} if _is_own(found, made_by) else found.decoder)
    return found


def has_mask_token(decoder: Mapping[str, Tensor]) -> bool:
    """Whether there is one, as every decoder of ours has, and few that are somebody's own."""
    return "mask_token" in decoder and decoder["mask_token"].ndim == 4


def _is_own(found: Found, made_by: object) -> bool:
    """Whether the decoder is somebody's own, so that nothing that it has or lacks is damage."""
    if found.layout != "fcmae":
        return False
    if made_by is not None:
        return made_by != CREATE_MODEL
    return not all(re.fullmatch(_DECODER, name) for name in found.decoder)


def _sorted_out(weights: dict[str, Tensor], whose: Layout) -> Found:
    match whose:
        case "fcmae":
            encoder, decoder = _below(weights, _OURS), _below(weights, "decoder.")
            return Found(encoder, decoder, whose, _others(weights, (_OURS, "decoder.")))
        case "hf":
            norms = [name for name in weights if name.startswith("hidden_states_norms.")]  # of a backbone
            kept = {name: value for name, value in weights.items() if name not in norms}
            bare = not any(name.startswith(_HF_BODY) for name in kept)  # ConvNextV2Model alone
            body = {f"{_HF_BODY}{name}": value for name, value in kept.items()} if bare else kept
            return Found(renamed(body, HF_TO_TIMM), {}, whose, tuple(norms))
        case "minkowski":
            dense = dict(_dense(name, value) for name, value in weights.items())
            decoder = {name: value for name, value in dense.items() if name in _decoder_names(dense)}
            rest = {name.removeprefix("encoder."): value for name, value in dense.items() if name not in decoder}
            return Found(renamed(rest, OFFICIAL_TO_TIMM), renamed(decoder, DECODER_TO_OURS), whose)
        case "official":
            return Found(renamed(weights, OFFICIAL_TO_TIMM), {}, whose)
    return Found(weights, {}, whose)


def _dense(name: str, value: Tensor) -> tuple[str, Tensor]:
    """A weight of the authors' sparse model as it would be in their dense one.

    MinkowskiEngine numbers the offsets of a kernel with the rows running fastest.
    """
    parts = [part for part in name.split(".") if part not in ("ln", "linear")]
    if parts[-1] == "kernel" and value.ndim in (2, 3):
        parts[-1] = "weight"
        side = math.isqrt(len(value))
        if side**2 != len(value):
            return ".".join(parts), value  # of no square kernel, so it will fit nowhere
        square = value.unflatten(0, (side, side))  # (column, row, C) or (column, row, in, out)
        value = square.permute(2, 1, 0)[:, None] if square.ndim == 3 else square.permute(3, 2, 1, 0)
    elif parts[-1] == "bias" and value.ndim == 2:  # (1, C)
        value = value.flatten()
    return ".".join(parts), value


def _decoder_names(names: Iterable[str]) -> set[str]:
    return {name for name in names if re.match(r"(decoder|proj|pred)\.|mask_token$", name)}


def _tensors(state: Any, file: Path) -> dict[str, Tensor]:
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())
        or not all(_is_plain(value) for value in state.values())
    ):
        raise UserError(f"{file} holds no state dict, names with a plain tensor each: give one of a ConvNeXt V2")
    # A few bytes can claim to be terabytes, by strides of zero or by one storage under many names. What is built from
    # their shapes would not be few bytes.
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state.values()}
    claimed = sum(value.nbytes for value in state.values())
    if claimed > sum(storages.values()):
        raise UserError(f"{file} claims {claimed:,} bytes of weights and stores fewer: it is damaged or made to harm")
    return state


def _is_plain(value: Tensor) -> bool:
    """Numbers in memory, at least one."""
    in_memory = value.layout == torch.strided and value.device.type == "cpu"
    return in_memory and not value.is_quantized and value.numel() > 0


def _check(found: Found, file: Path, *, known: dict[str, Tensor]) -> None:
    """Refuses what cannot be of an encoder, or of a decoder that is `known`."""
    encoder = found.encoder
    if any(re.fullmatch(r"stages\.\d\.blocks\.\d+\.gamma", name) for name in encoder):
        raise UserError(f"{file} holds a ConvNeXt of the first version, with layer scale: give a ConvNeXt V2")
    size = Size.of(encoder)
    blocks = sum(name.endswith(".conv_dw.weight") for name in encoder)
    if 0 in (*size.depths, *size.dims) or sum(size.depths) != blocks or STEM not in encoder or encoder[STEM].ndim != 4:
        raise UserError(f"{file} holds only part of a ConvNeXt V2, {size}: give one with four stages")
    if found.encoder.get("head.fc.weight", encoder[STEM]).ndim < 2:
        raise UserError(f"{file}: the classifier is no matrix: give weights of a ConvNeXt V2")
    if known and not has_mask_token(known):
        raise UserError(f"{file} holds only part of a decoder, without its mask token: give it whole, or leave it out")
    for name, value in (*encoder.items(), *known.items()):
        if not value.is_floating_point():
            raise UserError(f"{file}: {name} is {value.dtype}: give weights in floating point, not quantised ones")
        if not value.float().isfinite().all():
            raise UserError(f"{file}: {name} holds values that are not finite; the training that wrote it had failed")


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _others(names: Iterable[str], prefixes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if not name.startswith(prefixes))
