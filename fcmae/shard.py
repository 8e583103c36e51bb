"""`python -m fcmae.shard data=folder data.path=DIR out=DIR`: images into shards, which are read fast and from afar."""

import hashlib
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

from fcmae.command_line.config_check import check_whole
from fcmae.command_line.launch import build, config_folder, run
from fcmae.command_line.run_inference import progress_bar
from fcmae.data.datamodule import ImageDataModule
from fcmae.data.labelled import LabelledDataModule
from fcmae.data.shard_folder import ShardFolder, make_folder
from fcmae.data.shard_writer import ShardWriter, plan
from fcmae.errors import UserError

_PATHS = {"data.path": "train", "data.val_path": "val"}


def shard(config: DictConfig) -> None:
    """Packs the images of a data module into shards; goes on where an earlier start stopped.

    Raises:
        UserError: something that the user can mend.
    """
    _check(config)
    out = Path(config.out)
    unused = [0.5] * config.data.in_chans  # pictures are packed as they are, not normalised
    data: ImageDataModule = build(config.data, mean=unused, std=unused)
    parts = dict(zip(("train", "val"), data.split(), strict=True))
    labels, class_names = _labels(data)
    jobs = [job for part, indices in parts.items() for job in plan(part, indices, config.shard_size, config.seed)]
    with ShardFolder.locked(out):
        folder = ShardFolder(out, _parameters(config, data))
        for part in parts:
            make_folder(out / part)
        writer = ShardWriter(
            source=data.source,
            labels=labels,
            jobs=[job for job in jobs if job.file not in folder.packed],
            out=out,
            quality=config.quality,
            short_side=config.short_side,
        )
        _write(writer, folder, config.num_workers, most_broken=max(1, data.max_broken * sum(map(len, parts.values()))))
        for part in parts:
            folder.finish(part, class_names)
    _say_done(folder, _channels(config))


def _write(writer: ShardWriter, folder: ShardFolder, num_workers: int | str, most_broken: float) -> None:
    folder.check_skipped(most_broken)
    with progress_bar() as bar:
        task = bar.add_task("images", total=sum(len(job.indices) for job in writer.jobs))
        for job, packed in zip(writer.jobs, writer.write_all(num_workers), strict=True):
            folder.add(packed)
            bar.advance(task, len(job.indices))
            folder.check_skipped(most_broken)


def _labels(data: ImageDataModule) -> tuple[Tensor | None, list[str]]:
    """(class of every image, names of the classes), where there are any."""
    if not isinstance(data, LabelledDataModule) or data.labelled.labels is None:
        return None, []
    if data.is_multi_label:
        raise UserError("a shard's .cls holds one class, these images have several: pack them as data=folder, without")
    return data.labels, data.class_names


def _parameters(config: DictConfig, data: ImageDataModule) -> dict[str, Any]:
    """What the shards follow from."""
    train, held_out = (np.asarray(indices, dtype=np.int64) for indices in data.split())
    digest = hashlib.sha256(data.fingerprint().encode() + train.tobytes() + b"/" + held_out.tobytes()).hexdigest()
    images = f"{len(train)} to learn from and {len(held_out)} held out ({digest[:12]})"
    options = {name: config[name] for name in ("quality", "short_side", "shard_size", "seed")}
    return {"images": images, "data.in_chans": data.in_chans, **options}


def _check(config: DictConfig) -> None:
    check_whole(config, "data.in_chans", least=1)
    check_whole(config, "quality", least=1, most=100)
    check_whole(config, "shard_size", least=1)
    check_whole(config, "seed", least=0)
    if config.short_side is not None:
        check_whole(config, "short_side", least=1)
    if config.num_workers != "auto":
        check_whole(config, "num_workers", least=0)
    if not isinstance(config.out, str):
        raise UserError(f"out={config.out} must be text: a folder")


def _channels(config: DictConfig) -> str:
    """What to add to a training command: `data=webdataset` takes the images for natural ones unless told otherwise."""
    default = yaml.safe_load((config_folder() / "data/webdataset.yaml").read_text(encoding="utf-8"))
    if all(config.data[name] == default[name] for name in ("in_chans", "mean", "std")):
        return ""
    in_chans = "" if config.data.in_chans == default["in_chans"] else f" data.in_chans={config.data.in_chans}"
    return f"{in_chans} data.mean=auto data.std=auto"


def _say_done(folder: ShardFolder, channels: str) -> None:
    """Says what was written, and how to train on it, with these options for its channels."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    samples = sum(packed.shard.samples for packed in folder.packed.values())
    console.print(f"images: {samples}, in {len(folder.packed)} shards in {folder.path}", markup=False)
    if folder.skipped:
        console.print(f"images that could not be read: {len(folder.skipped)}, in {folder.list_skipped()}", markup=False)
    train, val = (shlex.quote(f"{name}={folder.path / part}") for name, part in _PATHS.items())
    console.print(
        f"to train on them: python -m fcmae.pretrain +model=tiny data=webdataset {train} {val}{channels}", markup=False
    )


if __name__ == "__main__":
    run("shard", shard)
