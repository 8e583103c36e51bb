"""`python faulty.py -m fcmae.pretrain key=value ...`: the same run, with faults, for FCMAE_PYTHON of a test's job.

FAULTY_SLEEP: seconds added to every training step; FAULTY_RANK: of this rank alone. FAULTY_PIDS: the process notes its
own id in FAULTY_PIDS.rankN.
"""

import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fcmae.command_line import launch


def faulty(run: Callable[..., None]) -> Callable[..., None]:
    """Replaces `launch.run`, so that signals are taken and torch is imported as ever."""

    def run_with_faults(verb: str, task: Any) -> None:
        from fcmae.training.pretraining import PretrainModule

        step = PretrainModule.training_step

        def training_step(module: Any, batch: Any, batch_idx: int) -> Any:
            if os.environ.get("FAULTY_RANK") in (None, os.environ["SLURM_PROCID"]):
                time.sleep(float(os.environ.get("FAULTY_SLEEP", 0)))
            return step(module, batch, batch_idx)

        PretrainModule.training_step = training_step
        run(verb, task)

    return run_with_faults


if __name__ == "__main__":
    assert sys.argv[1] == "-m"
    Path(f"{os.environ['FAULTY_PIDS']}.rank{os.environ['SLURM_PROCID']}").write_text(str(os.getpid()))
    launch.run = faulty(launch.run)
    module = sys.argv[2]
    sys.argv[1:] = sys.argv[3:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
