"""Trained weights from whatever file has them. Nothing is ever unpickled."""

import argparse
import contextlib
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fcmae.checkpoints.foreign import describe_foreign
from fcmae.checkpoints.format import DESCRIPTION, FORMAT, newest_checkpoint
from fcmae.checkpoints.hub import fetch, known_license
from fcmae.checkpoints.layouts import WRITTEN_BY, Layout, find_weights
from fcmae.checkpoints.lineage import Lineage, origin
from fcmae.errors import UserError

_STANDARD = (  # in a folder, the first that is there
    "model.safetensors",  # of fine-tuning, with the classifier, and of timm and transformers
    "encoder.safetensors",  # of pre-training
    "model.pth",  # in the authors' names
    "pytorch_model.bin",  # older ones of timm and transformers
)
_HUBS = ("hf-hub:", "timm:")
_AVERAGES = {"model": "model_ema", "state_dict": "state_dict_ema"}  # where the authors and timm keep weights


@dataclass(frozen=True)
class Weights:
    """What a file holds of a ConvNeXt V2.

    Attributes:
        weights: in timm's names: stem, stages, and of `head.norm` and `head.fc` what is there.
        file: where they are from.
        kind: whose file it is, in words.
        average: whether they are a moving average.
        description: what our own files say of themselves, see `fcmae.checkpoints.format.describe`; of others' files
            what is known of it, see `fcmae.checkpoints.foreign.describe_foreign`; None if nothing.
        layout: whose names the file has.
        decoder: of pre-training, in the names of `fcmae.models.decoder.Decoder`; empty where there is none.
        ignored: names in the file that have no place in a ConvNeXt V2 or its decoder.
        lineage: what they come from themselves, without this file.
        license: of this file, if it is known.
        source: what the file is called, without the folders of this machine.
    """

    weights: dict[str, Tensor]
    file: Path
    kind: str
    average: bool
    description: dict[str, Any] | None
    layout: Layout = "timm"
    decoder: dict[str, Tensor] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    lineage: Lineage = field(default_factory=list)
    license: str | None = None
    source: str = ""

    @property
    def ours(self) -> bool:
        """Whether fcmae wrote the file, so that its description is complete."""
        return self.description is not None and "format" in self.description

    def descent(self) -> Lineage:
        """The lineage of what is trained from these weights. Reads the whole file, for its checksum."""
        return [*self.lineage, origin(self.file, source=self.source, license=self.license)]


def read_weights(path: str | Path, *, ema: bool | None = None) -> Weights:
    """Weights to go on from, on the CPU.

    Args:
        path: a run's folder (its newest loadable checkpoint is taken), one of our `.ckpt` files, our export (the file
            or its folder), a folder of timm's or transformers', a state dict in their names or the authors', dense or
            of pre-training (.safetensors, .pth, .pt, .bin); or, to be downloaded, `hf-hub:user/name` or a model of
            timm's, `timm:convnextv2_tiny.fcmae`.
        ema: the moving average of the weights (True), the weights themselves (False), or, with None, those by which
            a `best.ckpt` was chosen, else the average where there is one.

    Raises:
        UserError: nothing there, truncated, more than plain data, no ConvNeXt V2, or no such thing as `ema` asks for.
    """
    name, fetched = str(path), None
    if name.startswith(_HUBS):
        fetched = fetch(name)
        path = fetched.folder
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
    found = find_weights(plain if ema is False else average or plain, file)
    said = description or describe_foreign(file.parent) if file.name in _STANDARD else description
    # What is known of a file counts before what somebody has written beside it.
    license = None if description else (fetched and fetched.license) or known_license(file.name)
    return Weights(
        weights=found.encoder,
        file=file,
        kind=_kind(found.layout, description, file, of_run=path.is_dir()),
        average=bool(average) and ema is not False,
        description=said,
        layout=found.layout,
        decoder=found.decoder,
        ignored=found.ignored,
        lineage=list((description or {}).get("lineage", [])),
        license=license or (said or {}).get("license"),
        source=f"{name.partition('@')[0]}@{fetched.revision}" if fetched else _source(file, description),
    )


def _kind(layout: Layout, description: dict[str, Any] | None, file: Path, *, of_run: bool) -> str:
    if description is None:
        return WRITTEN_BY[layout]
    if file.name in _STANDARD:
        return "fcmae export"
    if of_run:
        return f"fcmae {'fine-tuning' if is_classifier(description) else 'pre-training'} run"
    return "fcmae checkpoint"


def _source(file: Path, description: dict[str, Any] | None) -> str:
    run = (description or {}).get("run_name")
    return f"{run}/{file.name}" if run else file.name


def _find(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            others = f"an export or a state dict{_hub(path)}"
            raise UserError(f"{path} does not exist: give a run's folder, a checkpoint, {others}")
        return path
    for name in _STANDARD:
        if (path / name).is_file():
            return path / name
    file = newest_checkpoint(path)
    if file is None:
        raise UserError(f"{path} holds no checkpoint that can be read: give a run's folder, an export or a file")
    return file


def _hub(path: Path) -> str:
    """What may have been meant by a path that does not exist."""
    if re.fullmatch(r"convnextv2_\w+\.\w+", str(path)):
        return f", or timm:{path} to download it"
    return f", or hf-hub:{path} to download it" if re.fullmatch(r"[\w.-]+/convnextv2[\w.-]+", str(path)) else ""


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
        zipped = zipfile.is_zipfile(file)
        if zipped:
            _check_zip(file)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except UserError:
        raise
    except pickle.UnpicklingError as error:  # torch's own message advises to load it all the same
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {found[1]}" if found else "or it is truncated"
        raise UserError(f"{file} holds more than tensors and plain data ({what}): give a state dict alone") from error
    except Exception as error:
        raise UserError(f"{file} cannot be read, it is truncated or no checkpoint ({_reason(error)})") from error


def _check_zip(file: Path) -> None:
    """torch stores its entries as they are. Compressed ones could be a few bytes that unpack to terabytes."""
    with zipfile.ZipFile(file) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        claimed = sum(entry.file_size for entry in archive.infolist())
    if packed or claimed > file.stat().st_size:
        what = f"{packed[0]} is compressed" if packed else f"its entries claim {claimed:,} bytes"
        raise UserError(f"{file} is a zip file as torch does not write it ({what}): it is damaged or made to harm")


def _reason(error: Exception) -> str:
    return f"{(str(error).strip() or type(error).__name__).splitlines()[0]:.120}"


def _description(content: Any, file: Path) -> dict[str, Any] | None:
    """What one of our own files says of itself: a checkpoint inside, an export in the file beside it."""
    found: Any = content.get("fcmae") if isinstance(content, dict) else None
    if file.name in _STANDARD:
        with contextlib.suppress(OSError, ValueError):  # not there, or somebody else's
            found = json.loads((file.parent / DESCRIPTION).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not {"format", "model"} <= found.keys():
        return None
    if found["format"] != FORMAT:
        raise UserError(f"{file} has format {found['format']}, this fcmae reads {FORMAT}: use the fcmae that wrote it")
    return found


def is_classifier(description: Mapping[str, Any]) -> bool:
    """Whether one of our own files is of fine-tuning."""
    return description.get("task") == "classification"  # the first pre-training runs did not name theirs


def _plain_and_average(content: Any, description: Mapping[str, Any] | None) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Where in a file the weights are, and where their moving average; empty where there is none."""
    if not isinstance(content, dict):
        return {}, {}
    if description is not None and "fcmae" in content:
        state = content.get("state_dict")
        if is_classifier(description):
            return _below(state, "net."), _below(state, "ema.module.")
        return _below(state, "model."), {}
    plain, average = content, {}
    for names in _AVERAGES.items():
        found = [_below(content.get(name), "") for name in names]
        if any(found):
            plain, average = found
            break
    if description is not None and description.get("weights") == "moving average":  # of an export, which has one
        return {}, plain
    return plain, average


def _below(state: Any, prefix: str) -> dict[str, Any]:
    names = state if isinstance(state, dict) else {}
    return {
        name.removeprefix(prefix): value
        for name, value in names.items()
        if isinstance(name, str) and name.startswith(prefix)
    }
