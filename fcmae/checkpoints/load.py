"""A model back from a checkpoint, without running anything that the checkpoint says."""

from pathlib import Path
from typing import Any

import torch

from fcmae.checkpoints.format import FORMAT, newest_checkpoint, read_checkpoint
from fcmae.errors import UserError
from fcmae.masking import Masking, RandomMask
from fcmae.models.create import create_model
from fcmae.models.fcmae import FCMAE
from fcmae.models.targets import Pixels, Target

_MASKINGS = {"fcmae.masking.RandomMask": RandomMask}
_TARGETS = {"fcmae.models.targets.Pixels": Pixels}


def load(
    path: str | Path, *, masking: Masking | None = None, target: Target | None = None, engine: str = "auto"
) -> FCMAE:
    """The masked autoencoder of a checkpoint, in evaluation mode, on the CPU.

    Args:
        path: a run's folder (its newest loadable checkpoint is taken) or a `.ckpt` file.
        masking: instead of the checkpoint's own; needed where that is not one of fcmae's.
        target: likewise.
        engine: computes the model here, whichever it was trained with.

    Raises:
        UserError: no checkpoint there, a truncated one, not one of ours, or one whose weights do not fit its model.
    """
    file = newest_checkpoint(Path(path)) if Path(path).is_dir() else Path(path)
    if file is None:
        raise UserError(f"{path} holds no checkpoint that can be read: give a run's folder")
    checkpoint = read_checkpoint(file)
    description = checkpoint["fcmae"]
    if description["format"] != FORMAT:
        raise UserError(f"{file} has format {description['format']}, this fcmae reads {FORMAT}")
    if description.get("task") == "classification":
        raise UserError(f"{file} holds a classifier, no masked autoencoder: use fcmae.load_trained")
    options = dict(description["model"]) | {"engine": engine}
    options["masking"] = masking or _build(options.get("masking"), _MASKINGS, "masking", file)
    options["target"] = target or _build(options.get("target"), _TARGETS, "target", file)
    if options.pop("_target_", None) != "fcmae.models.create.create_model":
        raise UserError(f"{file} holds a model that fcmae.create_model did not make")
    try:
        model = create_model(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} asks for a model that this fcmae cannot make ({error})") from error
    weights = {
        name.removeprefix("model."): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith("model.")
    }
    load_weights(model, weights, file)
    model.encoder.net.head.requires_grad_(True)  # frozen in pre-training, wanted by whoever fine-tunes the net
    return model.eval()


def load_weights(model: torch.nn.Module, weights: dict[str, Any], file: Path) -> None:
    """Loads all of `weights` into all of `model`.

    Raises:
        UserError: a name is missing, left over or of another shape.
    """
    own = model.state_dict()
    missing, left_over = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    differing = sorted(name for name in own.keys() & weights.keys() if own[name].shape != _shape(weights[name]))
    if missing or left_over or differing:
        found = [("missing", missing), ("left over", left_over), ("of another shape", differing)]
        told = ", ".join(f"{len(names)} {what} (first: {names[0]})" for what, names in found if names)
        raise UserError(f"{file} does not fit the model: {told}")
    model.load_state_dict(weights)


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, torch.Tensor) else None


def _build(spec: Any, allowed: dict[str, Any], what: str, file: Path) -> Any:
    if spec is None:
        return None
    options = dict(spec)
    name = options.pop("_target_", None)
    if name not in allowed:
        raise UserError(f"{file} names the {what} {name!r}, which is not one of fcmae's: pass {what}=... to fcmae.load")
    try:
        return allowed[name](**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} asks for a {what} that this fcmae cannot make ({error})") from error
