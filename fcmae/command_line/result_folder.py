"""Where the results of an evaluation go, so that nothing of another one is lost."""

import json
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fcmae.command_line.run_inference import image_sides, stage_numbers
from fcmae.errors import UserError
from fcmae.inference.trained import Trained

_PREPARED = ("augment", "image_size", "in_chans", "mean", "std", "samples_per_epoch", "repeats", "max_broken")
"""Options of the data that the checkpoint decides, or that play no part here."""
_FILES = ("checkpoint", "data.path", "data.table")


def result_folder(config: DictConfig) -> Path:
    """The folder of the results: as given, or named after the run that the checkpoint is of, and what is unusual."""
    if config.out is not None:
        return Path(config.out)
    place, more = Path(config.checkpoint).resolve(), []
    if place.is_file() or place.suffix == ".ckpt":  # a folder, where it is sharded
        place, more = place.parent, [place.stem]
    place = place.parent if place.name in ("checkpoints", "exported") else place
    sides = image_sides(config.image_size)
    if sides is not None:
        more.append(str(sides[0]) if sides[0] == sides[1] else f"{sides[0]}x{sides[1]}")
    if config.split != "val" and config.probe is None:
        more.append(config.split)
    if config.probe is not None:
        stages = "".join(map(str, stage_numbers(config.stages) or []))
        more += [*([f"stages{stages}"] if stages else []), config.probe]
    return Path("outputs/evaluate") / "-".join([place.parent.name, place.name, *more])


def what_is_evaluated(config: DictConfig, trained: Trained) -> dict[str, Any]:
    """What is evaluated, and how: all that the numbers follow from."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    kind = "moving average" if trained.source.average else "weights"
    return {
        "checkpoint": str(trained.source.file),
        "weights": f"{kind} ({trained.source.kind})",
        "data": {key: _tidy(value) for key, value in data_options(config.data).items() if key not in _PREPARED},
        "split": config.split if config.probe is None else "val, learning from train",
        "classes": config.classes,
        "image_size": list(trained.preparation.image_size),
        "probe": config.probe,
        **({} if config.probe is None else {"stages": plain["stages"], "options": plain[config.probe]}),
    }


def data_options(data: DictConfig) -> dict[str, Any]:
    """What images there are and how they are read, but for what changes the speed alone."""
    options: Any = OmegaConf.to_container(data, resolve=True)
    return {name: value for name, value in options.items() if name not in ("batch_size", "num_workers", "timeout")}


def check_same(out: Path, what: dict[str, Any]) -> None:
    """Refuses to write over the results of another evaluation.

    Raises:
        UserError: says in what it differs.
    """
    try:
        earlier: dict[str, Any] = json.loads((out / "about.json").read_text(encoding="utf-8"))
        known: dict[str, Any] = earlier.pop("data", {})
    except (OSError, ValueError, AttributeError, TypeError):
        return
    pairs = [(key, earlier[key], value) for key, value in what.items() if key in earlier]
    pairs += [(f"data.{key}", known[key], value) for key, value in what["data"].items() if key in known]
    for key, before, now in pairs:
        same = Path(before).resolve() == Path(now).resolve() if key in _FILES and before and now else before == now
        if not same:
            raise UserError(
                f"{out} holds the results of another evaluation ({key}: {before}, now {now}): name a folder, out=DIR"
            )


def _tidy(place: Any) -> Any:
    """A path without what says nothing, such as a slash at its end; anything else as it is."""
    return os.path.normpath(place) if isinstance(place, str) and place and "://" not in place else place
