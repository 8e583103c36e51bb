"""How the processes of a run were started: compared with what the trainer is told, and left as they are."""

import hashlib
import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

import fcmae
from fcmae.errors import UserError

MICRO_BATCH = "data.batch_size"
"""Of what must be the same on all ranks: each of them finds its own with data.batch_size=auto."""


@dataclass(frozen=True)
class Launch:
    """How many processes there are, and who started them.

    Attributes:
        processes: on all nodes.
        environment: Lightning's name for who started them.
    """

    processes: int
    environment: ClusterEnvironment


def check_launch(options: Mapping[str, Any], environ: Mapping[str, str]) -> Launch:
    """Compares the processes that were started with those that the trainer will wait for.

    Args:
        options: `trainer.*`.
        environ: variables of this process, those of srun and torchrun among them.

    Raises:
        UserError: they are not the same; with the options that fit.
    """
    nodes, devices = _number(options, "num_nodes"), _devices(options)
    asked = f"trainer.num_nodes={nodes} trainer.devices={devices}"
    if "TORCHELASTIC_RUN_ID" in environ:
        started, here = int(environ["WORLD_SIZE"]), int(environ["LOCAL_WORLD_SIZE"])
        _check_started("torchrun", asked, (nodes, devices), (started // here, here))
        return Launch(started, TorchElasticEnvironment())
    if "SLURM_STEP_ID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        tasks = _tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
        if len(set(tasks)) != 1:
            raise UserError(
                f"srun started {', '.join(map(str, tasks))} processes on {len(tasks)} nodes: start as many on each, "
                "with --ntasks-per-node"
            )
        _check_started("srun", asked, (nodes, devices), (len(tasks), tasks[0]))
        return Launch(len(tasks) * tasks[0], SLURMEnvironment(auto_requeue=False))
    in_step = "SLURM_STEP_ID" in environ  # of one process, on some node of the job
    allocated = int(environ.get("SLURM_STEP_NUM_NODES" if in_step else "SLURM_JOB_NUM_NODES", "1"))
    if "SLURM_JOB_ID" in environ and max(nodes, allocated) > 1:
        raise UserError(
            f"this job has {allocated} nodes and {asked}, but one process was started: put srun before it, as in "
            f"srun --ntasks-per-node={devices} python -m fcmae...., or use sbatch scripts/pretrain.slurm"
        )
    if nodes > 1 and "MASTER_ADDR" not in environ:
        raise UserError(
            f"trainer.num_nodes={nodes}, but nothing says where the other nodes are: start the run with torchrun, or "
            "with srun in a SLURM job"
        )
    return Launch(nodes * devices, LightningEnvironment())


def leave_signals_to_us(trainer: L.Trainer) -> None:
    """Keeps Lightning from handling signals.

    Its handler of SIGTERM waits for the other ranks inside of the handler, and its loop asks rank 0 before each batch
    by a broadcast on the device, which makes the device wait. `Agreement` does that on the host.

    Raises:
        UserError: this Lightning calls that otherwise; a signal would be handled twice, or hang the run.
    """
    handlers = {"register_signal_handlers": getattr(trainer, "_signal_connector", None)}
    handlers["_broadcast_sigterm_tensor"] = trainer.fit_loop.epoch_loop
    for name, owner in handlers.items():
        if not callable(getattr(owner, name, None)):
            raise UserError(
                f"Lightning {L.__version__} has no {name}, by which signals are kept from it: install one that has, "
                "such as lightning==2.6.*"
            )
        setattr(owner, name, lambda: None)


def adopt_children(trainer: L.Trainer) -> list[subprocess.Popen[bytes]]:
    """The other processes of this machine, if Lightning started them.

    From here on Lightning's observer no longer sees them: it kills all, this process too, as soon as one has ended, and
    nobody would say which. Connected ranks notice by themselves.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return []
    adopted = list(launcher.procs)
    launcher.procs.clear()  # the list that the observer looks at
    return adopted


def same_everywhere(config: Mapping[str, Any], data: str, checkpoint: Path | None) -> dict[str, str]:
    """What must be the same on all ranks, by what it is called.

    Args:
        config: of the run.
        data: the images' fingerprint.
        checkpoint: from which it goes on.
    """
    return {
        "code": f"fcmae {fcmae.__version__} ({_code()})",
        "torch": torch.__version__,
        MICRO_BATCH: str(config["data"]["batch_size"]),
        "configuration": _digest(json.dumps(config, sort_keys=True, default=str).encode()),
        "set of images": data,
        "run folder": str(Path(config["run_dir"]).resolve()),
        "checkpoint": checkpoint.name if checkpoint is not None else "none",
    }


def _devices(options: Mapping[str, Any]) -> int:
    """Processes per node that the trainer will want."""
    devices, accelerator = options["devices"], options["accelerator"]
    if isinstance(devices, str) and "," in devices:  # "0,1", as Lightning takes it too
        devices = [one for one in devices.split(",") if one.strip()]
    if isinstance(devices, list):
        return len(devices)
    if str(devices) not in ("auto", "-1"):
        return _number(options, "devices", ", a list such as [0,1], auto, or -1 for all")
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.cuda.device_count() if on_gpu else 1


def _number(options: Mapping[str, Any], name: str, more: str = "") -> int:
    try:
        return int(options[name])
    except (TypeError, ValueError) as error:
        raise UserError(f"trainer.{name}={options[name]} must be a number{more}") from error


def _check_started(by: str, asked: str, wanted: tuple[int, int], started: tuple[int, int]) -> None:
    if wanted != started:
        raise UserError(
            f"{by} started {started[1]} processes on each of {started[0]} nodes, but the trainer waits for {asked}: "
            f"add trainer.num_nodes={started[0]} trainer.devices={started[1]}"
        )


def _tasks_per_node(told: str) -> list[int]:
    """SLURM's `2(x3),1`: [2, 2, 2, 1]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", told)
    return [int(tasks) for tasks, nodes in found for _ in range(int(nodes or 1))]


def _code() -> str:
    folder = Path(fcmae.__file__).parent
    files = sorted(folder.rglob("*.py"))
    return _digest(b"".join(file.relative_to(folder).as_posix().encode() + file.read_bytes() for file in files))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
