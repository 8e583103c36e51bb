"""The folder that a run lives in: what it holds, and whether a run may go on in it."""

import contextlib
import json
import platform
import re
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from filelock import FileLock, Timeout

from fcmae.checkpoints.format import newest_checkpoint
from fcmae.checkpoints.sharded import remove
from fcmae.errors import UserError
from fcmae.files import write_text
from fcmae.training.journal import Journal

# What may differ when a run goes on: it changes how the run is watched or fed, or on how many devices it runs, not
# what it computes. Where it changes the effective batch, `check_same_steps` notices.
FREE_TO_CHANGE = (
    "resume",
    "run_name",
    "run_dir",
    "logger",
    "pictures",
    "save",
    "probe",
    "rank_timeout",
    "data.batch_size",
    "data.num_workers",
    "data.timeout",
    "data.cache_dir",
    "data.cache_gib",
    "data.max_broken",
    "trainer.accelerator",
    "trainer.strategy",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.log_every_n_steps",
    "trainer.check_val_every_n_epoch",
    "trainer.limit_val_batches",
    "trainer.profiler",
    "trainer.max_time",
)


class RunFolder:
    """Paths and state of one run.

    Args:
        path: `outputs/<task>/<run_name>`; the same for every start of the run, which is how it finds itself again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.summary = path / "summary.json"
        self.log = path / "train.log"
        self.metrics = path / "metrics.jsonl"
        self.journal = Journal(path / "journal.jsonl")
        self.skipped = path / "skipped.jsonl"
        self.checkpoints = path / "checkpoints"
        self.exported = path / "exported"
        self.images = path / "images"

    def is_finished(self) -> bool:
        """Whether the run in it has come to its end."""
        return self.summary.is_file()

    def check_same(self, config: dict[str, Any]) -> None:
        """Refuses to go on with another configuration.

        Raises:
            UserError: names what differs from the run in the folder.
        """
        if not self.config.is_file() or self.newest_checkpoint() is None:
            return  # nothing has been trained that could be lost
        earlier = yaml.safe_load(self.config.read_text(encoding="utf-8")) or {}
        differing = _told_once(_differences(earlier, config))
        if differing:
            raise UserError(
                f"{self.path} holds a run with another configuration ({', '.join(differing)}): "
                "give this one another run_name, or resume=never to start over (the old run is kept aside)"
            )

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint that can be read, if any."""
        return newest_checkpoint(self.path)

    def set_aside(self) -> Path | None:
        """Renames an existing folder, so that a new run can begin and nothing is lost; returns where it went.

        Raises:
            UserError: it cannot be renamed.
        """
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return None
        if not self.config.is_file():
            raise UserError(f"{self.path} is no run's folder, so it stays where it is: name another with run_dir=...")
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old{number}")).exists():
            number += 1
        try:
            with self.lock():
                return self.path.rename(aside)
        except OSError as error:
            raise UserError(f"cannot rename {self.path} to {aside.name}: {error.strerror}") from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from training in the folder.

        Raises:
            UserError: one does.
        """
        self._make(self.path)
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(f"another process trains in {self.path}: wait for it, or give another run_name") from error
        with lock:
            yield

    def create(self, config: dict[str, Any], overrides: list[str]) -> None:
        """Makes the folder and notes what is run in it.

        Raises:
            UserError: it cannot be written.
        """
        for folder in (self.checkpoints, self.images, self.path / ".hydra"):
            self._make(folder)
        for folder in (self.checkpoints, self.exported, self.images):
            for leftover in folder.glob(".*.tmp"):  # of a run that was killed while it wrote
                remove(leftover)
        write_text(self.config, yaml.safe_dump(config, sort_keys=False))
        write_text(self.path / ".hydra" / "overrides.yaml", yaml.safe_dump(overrides))
        write_text(self.environment, json.dumps(_environment(), indent=2) + "\n")

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write the run folder {self.path}: {error.strerror}; name another with run_dir=..."
            ) from error


class _Difference(NamedTuple):
    name: str
    before: Any
    now: Any


def _differences(earlier: dict[str, Any], config: dict[str, Any], prefix: str = "") -> Iterator[_Difference]:
    for key in sorted({*earlier, *config}, key=str):
        name = f"{prefix}{key}"
        if name in FREE_TO_CHANGE:
            continue
        before, now = earlier.get(key), config.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, f"{name}.")
        elif before != now:
            yield _Difference(name, before, now)


def _told_once(differences: Iterator[_Difference]) -> list[str]:
    """Without those that follow from another, such as `data.augment.flip` from `augment.flip`."""
    told: dict[str, str] = {}
    for name, before, now in sorted(differences, key=lambda found: found.name.count(".")):  # data before model
        followed = re.sub(r"^(data|model)\.|^trainer\.max_", "", name)
        told.setdefault(f"{followed}: {before} -> {now}", f"{name}: {before} -> {now}")
    return list(told.values())


def _environment() -> dict[str, Any]:
    packages = ("fcmae", "torch", "torchvision", "lightning", "timm", "hydra-core")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": devices or [platform.processor() or platform.machine()],
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in packages},
    }
