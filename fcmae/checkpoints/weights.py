"""Trained weights from whatever file has them. Nothing is ever unpickled."""

import argparse
import contextlib
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fcmae.checkpoints.format import FORMAT, newest_checkpoint
from fcmae.checkpoints.names import in_timm_names
from fcmae.errors import UserError

_EXPORTS = ("model.safetensors", "encoder.safetensors")  # of fine-tuning, with the classifier, and of pre-training
_AVERAGES = {"model": "model_ema", "state_dict": "state_dict_ema"}  # where the authors and timm keep weights


@dataclass(frozen=True)
class Weights:
    """What a file holds of a ConvNeXt V2.

    Attributes:
        weights: in timm's names: stem, stages, and of `head.norm` and `head.fc` what is there.
        file: where they are from.
        kind: whose file it is, in words.
        average: whether they are a moving average.
        description: what our own files say of themselves, see `fcmae.checkpoints.format.describe`; None for others.
    """

    weights: dict[str, Tensor]
    file: Path
    kind: str
    average: bool
    description: dict[str, Any] | None


def read_weights(path: str | Path, *, ema: bool | None = None) -> Weights:
    """Weights to go on from, on the CPU.

    Args:
        path: a run's folder (its newest loadable checkpoint is taken), one of our `.ckpt` files, our export (the file
            or its folder), or a state dict in timm's or the authors' dense names (.safetensors, .pth, .pt, .bin).
        ema: the moving average of the weights (True), the weights themselves (False), or, with None, those by which
            a `best.ckpt` was chosen, else the average where there is one.

    Raises:
        UserError: nothing there, truncated, more than plain data, no ConvNeXt V2, or no such thing as `ema` asks for.
    """
    path = Path(path)
    file = _find(path)
    content = _read_safetensors(file) if file.suffix == ".safetensors" else _read_plain_data(file)
    description = _description(content, file)
    plain, average = _plain_and_average(content, description)
    best = (description or {}).get("best", {}).get("metric")
    if ema is None and best is not None:
        ema = best.startswith("val_ema_")
    if ema and not average:
        raise UserError(f"{file} holds no moving average of the weights: read the weights themselves, ema=False")
    if ema is False and average and not plain:
        raise UserError(f"{file} holds the moving average of the weights alone: read that, ema=True")
    weights, names = in_timm_names(plain if ema is False else average or plain, file)
    kind: str = names
    if description is not None and file.name in _EXPORTS:
        kind = "fcmae export"
    elif description is not None and path.is_dir():
        kind = f"fcmae {'fine-tuning' if _is_classifier(description) else 'pre-training'} run"
    elif description is not None:
        kind = "fcmae checkpoint"
    return Weights(weights, file, kind, bool(average) and ema is not False, description)


def _find(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"{path} does not exist: give a run's folder, a checkpoint, an export or a state dict")
        return path
    for name in _EXPORTS:
        if (path / name).is_file():
            return path / name
    file = newest_checkpoint(path)
    if file is None:
        raise UserError(f"{path} holds no checkpoint that can be read: give a run's folder, an export or a file")
    return file


def _read_safetensors(file: Path) -> Any:
    try:
        return load_file(file)
    except Exception as error:
        raise UserError(f"{file} cannot be read, it is truncated or no safetensors file ({_reason(error)})") from error


def _read_plain_data(file: Path) -> Any:
    # Files of the authors and of timm hold their command line. Letting argparse.Namespace through runs nothing of a
    # file's choice: it has no __setstate__ or __reduce__ and takes no positional arguments, so a file can only set
    # attributes of a new one, to values that the same reader has let through. (One named __setstate__ would be called,
    # but the functions that get through may be called anyway.) Nothing here looks at them.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:  # torch's own message advises to load it all the same
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {found[1]}" if found else "or it is truncated"
        raise UserError(f"{file} holds more than tensors and plain data ({what}): give a state dict alone") from error
    except Exception as error:
        raise UserError(f"{file} cannot be read, it is truncated or no checkpoint ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return f"{(str(error).strip() or type(error).__name__).splitlines()[0]:.120}"


def _description(content: Any, file: Path) -> dict[str, Any] | None:
    """What one of our own files says of itself: a checkpoint inside, an export in the file beside it."""
    found: Any = content.get("fcmae") if isinstance(content, dict) else None
    if file.name in _EXPORTS:
        with contextlib.suppress(OSError, ValueError):  # not there, or somebody else's
            found = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not {"format", "model"} <= found.keys():
        return None
    if found["format"] != FORMAT:
        raise UserError(f"{file} has format {found['format']}, this fcmae reads {FORMAT}: use the fcmae that wrote it")
    return found


def _is_classifier(description: Mapping[str, Any]) -> bool:
    return description.get("task") == "classification"  # the first pre-training runs did not name theirs


def _plain_and_average(content: Any, description: Mapping[str, Any] | None) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Where in a file the weights are, and where their moving average; empty where there is none."""
    if not isinstance(content, dict):
        return {}, {}
    if description is not None and description.get("weights") == "moving average" and "fcmae" not in content:
        return {}, content
    if description is not None and "fcmae" in content:
        state = content.get("state_dict")
        if _is_classifier(description):
            return _below(state, "net."), _below(state, "ema.module.")
        return _below(state, "model.encoder.net."), {}
    for names in _AVERAGES.items():
        plain, average = (_below(content.get(name), "") for name in names)
        if plain or average:
            return plain, average
    return content, {}


def _below(state: Any, prefix: str) -> dict[str, Any]:
    names = state if isinstance(state, dict) else {}
    return {
        name.removeprefix(prefix): value
        for name, value in names.items()
        if isinstance(name, str) and name.startswith(prefix)
    }
