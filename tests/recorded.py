"""`python tests/recorded.py <arguments of fcmae.pretrain>`: a run that writes down what it sees, and may be killed.

RECORD: file that gets a JSON line per batch, before it is learned from. KILL_AT: the batch before which this process,
and all that it has started, are killed without warning.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from fcmae.command_line import launch
from fcmae.data.source import Batch
from fcmae.pretrain import pretrain
from fcmae.training.pretraining import PretrainModule

Seen = dict[tuple[int, int], list[str]]
"""By (optimiser step, place in it): names of the samples, with their seeds."""


class Recorder:
    """Replaces `PretrainModule.training_step`."""

    def __init__(self, file: Path, kill_at: int | None = None) -> None:
        self.file = file
        self.kill_at = kill_at
        self.batches = 0
        self.step = PretrainModule.training_step

    def __get__(self, module: PretrainModule, owner: type) -> Any:
        def training_step(batch: Batch, batch_idx: int) -> torch.Tensor:
            self.batches += 1
            if self.batches == self.kill_at:
                os.killpg(0, signal.SIGKILL)
            trainer = module.trainer
            place = batch_idx % trainer.accumulate_grad_batches * trainer.world_size + trainer.global_rank
            names = [f"{name} {seed}" for name, seed in zip(batch.sample_ids, batch.seeds.tolist(), strict=True)]
            with self.file.open("a") as file:
                file.write(json.dumps([module.global_step, place, names]) + "\n")
            return self.step(module, batch, batch_idx)

        return training_step


def seen(file: Path) -> Seen:
    """What was learned from; of a step that was done again after a kill, the last time counts."""
    lines = map(json.loads, file.read_text().splitlines())
    return {(step, place): names for step, place, names in lines}


if __name__ == "__main__":
    kill_at = os.environ.get("KILL_AT")
    PretrainModule.training_step = Recorder(Path(os.environ["RECORD"]), kill_at and int(kill_at))  # type: ignore
    sys.argv[0] = str(Path(__file__).resolve())
    launch.run("pretrain", pretrain)
