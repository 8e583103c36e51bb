"""What our checkpoint files hold beside Lightning's own entries, and how they are found and read."""

import pickle
import re
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import fcmae
from fcmae.checkpoints.lineage import Lineage
from fcmae.checkpoints.recipe import recipe
from fcmae.checkpoints.sharded import is_sharded, read_sharded
from fcmae.errors import TransientError, UserError, in_a_line
from fcmae.files import exists, reading

FORMAT = 1
_NAME = "epoch=*-step=*.ckpt"
DESCRIPTION = "fcmae.json"
"""Beside exported weights: what our checkpoints say of themselves."""


def describe(config: dict[str, Any], task: str, *, lineage: Lineage, **more: Any) -> dict[str, Any]:
    """What a checkpoint says of itself: plain data from which the model can be made again.

    Args:
        config: of the run, resolved, as plain dictionaries with `model` and `data`.
        task: pretraining or classification.
        lineage: of the weights that it starts from; empty from scratch.
        more: what else the task's models need to be used.
    """
    return {
        "format": FORMAT,
        "fcmae": fcmae.__version__,
        "task": task,
        "run_name": config.get("run_name"),
        "model": config["model"],
        "input": {key: config["data"][key] for key in ("image_size", "in_chans", "mean", "std")},
        "recipe": recipe(config),
        "versions": {name: version(name) for name in ("torch", "torchvision", "timm", "lightning")},
        "lineage": lineage,
        **more,
    }


def check_same_steps(earlier: dict[str, Any], now: dict[str, Any], file: Path) -> None:
    """Refuses to go on where the next step would not be the one that was to follow.

    Args:
        earlier: the description in a checkpoint.
        now: that of the run; both may have `steps`, what the order of samples and the schedule follow from.
        file: the checkpoint.

    Raises:
        UserError: names what has changed.
    """
    for name, value in now.get("steps", {}).items():
        before = earlier.get("steps", {}).get(name, value)
        if before != value:
            raise UserError(
                f"{file} was trained with {name} {before}, now it is {value}: give another run_name, "
                "or resume=never to start over (the old run is kept aside)"
            )


def read_checkpoint(file: Path) -> dict[str, Any]:
    """The content of one of our checkpoints, mapped from the disk rather than read; `Rows` where it is sharded.

    Raises:
        UserError: no such file, truncated, or not one of ours.
        TransientError: its file system does not answer, or does not let us read.
    """
    try:
        with reading(file):
            if not (exists(file) and (file.is_file() or is_sharded(file))):
                raise UserError(f"{file} does not exist: give a run's folder or a .ckpt file")
            checkpoint: Any = (
                read_sharded(file)
                if file.is_dir()
                else torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            )
    except UserError:
        raise
    except pickle.UnpicklingError as error:  # torch's own message advises to load it all the same
        raise UserError(f"{file} is no checkpoint of plain data; what else it holds is not loaded") from error
    except Exception as error:
        reason = f"{in_a_line(error):.120}"
        raise UserError(f"{file} cannot be read, it is truncated or no checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{file} is not a checkpoint of fcmae: it holds no weights")
    description = checkpoint.get("fcmae")
    if not isinstance(description, dict) or not {"format", "model"} <= description.keys():
        raise UserError(f"{file} is not a checkpoint of fcmae: it lacks the description of its model")
    return checkpoint


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the most steps that can be read, of a run's folder; None if there is none.

    Raises:
        UserError: there are some, and none of them can be read; or the run would begin again without a word.
        TransientError: their file system does not answer.
    """
    folder, damaged = run / "checkpoints", dict[str, UserError]()
    with reading(folder):
        names = [file.name for file in folder.iterdir()] if exists(folder) else []
    files = sorted((folder / name for name in names if fnmatch(name, _NAME)), key=_step, reverse=True)
    for file in [*files, *([folder / "last.ckpt"] if "last.ckpt" in names else [])]:
        try:
            read_checkpoint(file)
        except TransientError:
            raise
        except UserError as error:
            damaged[file.name] = error
            continue
        return file
    if damaged:
        first, *others = damaged
        more = f", nor can {' and '.join(others)}" if others else ""
        raise UserError(
            f"{run} holds no checkpoint that can be read: {damaged[first]}{more}; copy one back, or start over with "
            "resume=never, which sets the run aside"
        )
    return None


def passed_over(checkpoint: Path) -> list[Path]:
    """Checkpoints beside the newest that can be read which have more steps, and cannot be read."""
    files = checkpoint.parent.glob(_NAME)  # all of them, if it is last.ckpt, which is tried last
    return sorted((file for file in files if _step(file) > _step(checkpoint)), key=_step)


def _step(file: Path) -> int:
    found = re.search(r"step=(\d+)", file.name)
    return int(found.group(1)) if found else -1
