"""Trained weights from whatever file has them. Nothing is ever unpickled."""

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fcmae.checkpoints.descriptions import check_description, is_license
from fcmae.checkpoints.foreign import describe_foreign
from fcmae.checkpoints.format import DESCRIPTION, FORMAT, newest_checkpoint
from fcmae.checkpoints.hub import Fetched, fetch, known_license, stated_license
from fcmae.checkpoints.layouts import WRITTEN_BY, Layout, find_weights
from fcmae.checkpoints.lineage import DROPPED, Lineage, binding, origin
from fcmae.checkpoints.names import WEIGHT_FILES
from fcmae.checkpoints.opening import open_weights
from fcmae.checkpoints.sharded import is_sharded
from fcmae.errors import UserError

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
        """The lineage of what is trained from these weights. Reads the whole file, for its checksum.

        Raises:
            UserError: it is gone by now.
        """
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
    path = fetched.folder if fetched else Path(name).expanduser()
    file = _find(path)
    content, carried = open_weights(file)
    description = _description(content, file)
    plain, average = _plain_and_average(content, description)
    best = (description or {}).get("best", {}).get("metric")
    if ema is None and best is not None:
        ema = best.startswith("val_ema_")
    if ema and not average:
        raise UserError(f"{file} holds no moving average of the weights: read the weights themselves, ema=False")
    if ema is False and average and not plain:
        raise UserError(f"{file} holds the moving average of the weights alone: read that, ema=True")
    made_by = (description or {}).get("model", {}).get("_target_")
    found = find_weights(plain if ema is False else average or plain, file, made_by=made_by)
    said = description or (describe_foreign(file.parent) if file.name in WEIGHT_FILES else None)
    if description is None and carried:  # one of our exports that has lost the description beside it
        said = (said or {}) | carried
    return Weights(
        weights=found.encoder,
        file=file,
        kind=_kind(found.layout, description, file, of_run=path.is_dir()),
        average=bool(average) and ema is not False,
        description=said,
        layout=found.layout,
        decoder=found.decoder,
        ignored=found.ignored,
        lineage=list((said or {}).get("lineage", [])),
        license=_license(file, said, fetched),
        source=f"hf-hub:{fetched.repo}@{fetched.revision}" if fetched else _source(file, description),
    )


def _kind(layout: Layout, description: dict[str, Any] | None, file: Path, *, of_run: bool) -> str:
    if description is None:
        return WRITTEN_BY[layout]
    if file.name in WEIGHT_FILES:
        return "fcmae export"
    if of_run:
        return f"fcmae {'fine-tuning' if is_classifier(description) else 'pre-training'} run"
    return "fcmae checkpoint"


def _source(file: Path, description: dict[str, Any] | None) -> str:
    run = (description or {}).get("run_name")
    return f"{run}/{file.name}" if run else file.name


def _find(path: Path) -> Path:
    if is_sharded(path):
        return path
    if not path.is_dir():
        if not path.is_file():
            others = f"an export or a state dict{_hub(path)}"
            raise UserError(f"{path} does not exist: give a run's folder, a checkpoint, {others}")
        return path
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    file = newest_checkpoint(path)
    if file is None:
        if (path / "model.safetensors.index.json").is_file():
            raise UserError(f"{path} holds its weights in several files: save them in one, with max_shard_size='99GB'")
        if (path / DESCRIPTION).is_file():
            raise UserError(
                f"{path} is an export for other programs alone: give what it was made of, or to=timm, to=hf"
            )
        others = ", ".join(WEIGHT_FILES)
        raise UserError(
            f"{path} holds no checkpoint that can be read: give a run's folder, a file, or one with {others}"
        )
    return file


def _hub(path: Path) -> str:
    """What may have been meant by a path that does not exist."""
    if re.fullmatch(r"convnextv2_\w+\.\w+", str(path)) and path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
        return f", or timm:{path} to download it"
    return f", or hf-hub:{path} to download it" if re.fullmatch(r"[\w.-]+/convnextv2[\w.-]+", str(path)) else ""


def _license(file: Path, said: dict[str, Any] | None, fetched: Fetched | None) -> str | None:
    """Of all that is said of a file's licence, what binds most."""
    stated = [(said or {}).get("license")]
    if not any(entry.get(DROPPED) for entry in (said or {}).get("lineage", [])):  # else what it says itself counts
        # As the hub's cache calls its folders, and as we say to call one that is fetched by hand.
        repositories = [part.removeprefix("models--").replace("--", "/", 1) for part in file.absolute().parts]
        stated += map(known_license, repositories)
        if fetched is not None:
            stated.append(fetched.license)
        elif file.name in WEIGHT_FILES:
            stated.append(stated_license(file.parent))
    return binding([license for license in stated if is_license(license)])


def _description(content: Any, file: Path) -> dict[str, Any] | None:
    """What one of our own files says of itself: a checkpoint inside, an export in the file beside it."""
    found: Any = content.get("fcmae") if isinstance(content, dict) else None
    if file.name in WEIGHT_FILES:
        with contextlib.suppress(OSError, ValueError, RecursionError):  # not there, or somebody else's
            found = json.loads((file.parent / DESCRIPTION).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not {"format", "model"} <= found.keys():
        return None
    if found["format"] != FORMAT:
        raise UserError(f"{file} has format {found['format']}, this fcmae reads {FORMAT}: use the fcmae that wrote it")
    check_description(found, file)
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
