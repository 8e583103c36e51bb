"""A masked autoencoder back from a file, without running anything that the file says."""

import logging
import re
from pathlib import Path
from typing import Any

import torch

from fcmae.checkpoints.layouts import CREATE_MODEL, has_mask_token
from fcmae.checkpoints.load_autoencoder import load_autoencoder
from fcmae.checkpoints.load_into import AdaptChannels
from fcmae.checkpoints.names import STEM, Size, has_grn
from fcmae.checkpoints.weights import Weights, is_classifier, read_weights
from fcmae.errors import UserError
from fcmae.masking import Masking, RandomMask
from fcmae.models.create import create_model
from fcmae.models.fcmae import FCMAE
from fcmae.models.targets import Pixels, Target

log = logging.getLogger(__name__)

_PER_STAGE = ("depths", "dims")
# What a file may name: a name in it runs no code but this.
_MASKINGS = {"fcmae.masking.RandomMask": RandomMask}
_TARGETS = {"fcmae.models.targets.Pixels": Pixels}


def load(
    path: str | Path,
    *,
    masking: Masking | None = None,
    target: Target | None = None,
    engine: str = "auto",
    in_chans: int | None = None,
    adapt_in_chans: AdaptChannels | None = None,
    strict: bool = True,
) -> FCMAE:
    """The masked autoencoder of any file that `read_weights` reads, in evaluation mode, on the CPU.

    One of our pre-training, or the authors', comes back whole; of any other file it is the encoder, with a new decoder,
    and a warning says so. Sizes follow from the weights. The authors' model of pre-training is taken as their code
    runs it, with GRN's norms over the whole batch.

    Args:
        path: a run's folder (its newest loadable checkpoint is taken), a file, an export, `hf-hub:user/name` or
            `timm:model.tag`.
        masking: instead of the checkpoint's own; needed where that is none that is built here.
        target: likewise.
        engine: computes the model here, whichever it was trained with.
        in_chans: channels of an image, if not those of the file; then `adapt_in_chans` has to say how.
        adapt_in_chans: `sum` or `repeat`, see `load_into`; the decoder is new then.
        strict: refuse a file that fits only in part; else what is missing stays as it was initialised.

    Raises:
        UserError: nothing there, a truncated file, one of another network, or weights that do not fit each other.
    """
    weights = read_weights(path)
    options = _described(weights, masking, target) | {"engine": engine}
    _check_sizes(options, sizes := _sizes(weights), weights.file)
    options |= sizes | ({} if in_chans is None else {"in_chans": in_chans})
    how: dict[str, Any] = {"adapt_in_chans": adapt_in_chans, "strict": strict}
    try:
        with torch.device("meta"):  # nothing is allocated before all is known to fit
            load_autoencoder(create_model(**options), weights, **how)
        model = create_model(**options)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError) and str(error).startswith(str(weights.file)):
            raise
        raise UserError(f"{weights.file} asks for a model that this fcmae cannot make ({error})") from error
    report = load_autoencoder(model, weights, **how)
    for line in report.lines():
        log.info(line)
    if report.why_fresh:
        log.warning(
            "%s: the decoder is new, %s; train it before you trust a prediction", weights.file, report.why_fresh
        )
    model.encoder.net.head.requires_grad_(True)  # frozen in pre-training, wanted by whoever fine-tunes the net
    return model.eval()


def _described(weights: Weights, masking: Masking | None, target: Target | None) -> dict[str, Any]:
    """The options of `create_model` that do not follow from the weights."""
    if weights.description is None or not weights.ours or is_classifier(weights.description):
        scope = {"grn_scope": "batch"} if weights.layout == "minkowski" else {}
        return {"masking": masking, "target": target, **scope}
    options = dict(weights.description["model"])
    if options.pop("_target_", None) != CREATE_MODEL:
        raise UserError(
            f"{weights.file} holds a model that fcmae.create_model did not make: fcmae.load_trained gives its encoder"
        )
    if not weights.decoder:
        options = {name: value for name, value in options.items() if name not in ("decoder_depth", "decoder_dim")}
    options["masking"] = masking or _build(options.get("masking"), _MASKINGS, "masking", weights.file)
    options["target"] = target or _build(options.get("target"), _TARGETS, "target", weights.file)
    return options


def _sizes(weights: Weights) -> dict[str, Any]:
    """Those that do, whatever the file says of itself."""
    size = Size.of(weights.weights)
    options: dict[str, Any] = {
        "size": size.name,
        "depths": size.depths,
        "dims": size.dims,
        "in_chans": weights.weights[STEM].shape[1],
        "use_grn": has_grn(weights.weights),
    }
    if has_mask_token(weights.decoder):
        numbers = {int(found[1]) for name in weights.decoder if (found := re.match(r"blocks\.([0-9]{1,4})\.", name))}
        options |= {"decoder_depth": len(numbers), "decoder_dim": weights.decoder["mask_token"].shape[1]}
    return options


def _check_sizes(said: dict[str, Any], held: dict[str, Any], file: Path) -> None:
    for name, value in held.items():
        stated = said.get(name)
        if (
            name != "size"
            and stated is not None
            and stated not in (value, list(value) if name in _PER_STAGE else value)
        ):
            raise UserError(f"{file} contradicts itself: it says {name}={stated} and holds {value}; it is damaged")


def _build(spec: Any, allowed: dict[str, Any], what: str, file: Path) -> Any:
    if spec is None:
        return None
    options = dict(spec) if isinstance(spec, dict) else {"_target_": spec}
    name = options.pop("_target_", None)
    if not isinstance(name, str) or name not in allowed:
        raise UserError(
            f"{file} names the {what} {name!r}, which is not one that fcmae.load builds ({', '.join(allowed)}): "
            f"pass the object itself, {what}=..."
        )
    try:
        return allowed[name](**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} asks for a {what} that this fcmae cannot make ({error})") from error
