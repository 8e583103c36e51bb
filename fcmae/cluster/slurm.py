"""What SLURM has given a job, how `srun` is to use it, and what SLURM says of the job."""

import os
import re
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fcmae.errors import UserError

# They would make srun divide the job otherwise than it is told to: --gpus-per-task shows each rank a single GPU under
# the number 0, --cpus-per-gpu is refused for a job without GPUs and beside --cpus-per-task.
_NOT_FOR_SRUN = ("SLURM_GPUS_PER_TASK", "SLURM_CPUS_PER_GPU")


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What a job has, on each of its nodes the same.

    Attributes:
        job: its number.
        restarts: how often it has been requeued.
        nodes: how many.
        gpus: per node; 0 for a job on CPUs.
        tasks: processes per node that were asked for.
        cpus: on the node that has the fewest.
    """

    job: str
    restarts: int
    nodes: int
    gpus: int
    tasks: int
    cpus: int

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Allocation":
        """Reads the variables of a batch script.

        Raises:
            UserError: this is no SLURM job, or its nodes are to get different numbers of processes.
        """
        for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST"):
            if name not in environ:
                raise UserError(f"{name} is not set, so this is no SLURM job: sbatch -N 2 scripts/pretrain.slurm ...")
        nodes, total = int(environ["SLURM_JOB_NUM_NODES"]), int(environ.get("SLURM_NTASKS", 0))
        if total % nodes and "SLURM_NTASKS_PER_NODE" not in environ:
            raise UserError(f"--ntasks={total} is no multiple of {nodes} nodes: use --ntasks-per-node instead")
        gpus = environ.get("SLURM_GPUS_ON_NODE") or environ.get("SLURM_GPUS_PER_NODE") or "0"  # 8, or a100:8
        cpus = re.findall(r"(\d+)(?:\(x\d+\))?", environ.get("SLURM_JOB_CPUS_PER_NODE", "1"))  # 16(x2),8
        return cls(
            job=environ["SLURM_JOB_ID"],
            restarts=int(environ.get("SLURM_RESTART_COUNT", 0)),
            nodes=nodes,
            gpus=int(gpus.rpartition(":")[2]),
            tasks=int(environ.get("SLURM_NTASKS_PER_NODE", 0)) or max(1, total // nodes),
            cpus=min(map(int, cpus)),
        )

    def geometry(self, trainer: Mapping[str, Any], typed: Collection[str]) -> dict[str, int | str]:
        """What the trainer is to be told, so that it waits for the processes that srun starts.

        Args:
            trainer: `trainer.*` as composed.
            typed: names of the options that the user gave.

        Raises:
            UserError: the user gave something that this job is not; or there are fewer CPUs than processes.
        """
        on_gpu = self.gpus > 0 and trainer["accelerator"] != "cpu"
        devices = self.gpus if on_gpu else self.tasks
        per_node = "--gpus-per-node" if on_gpu else "--ntasks-per-node"
        here = f"--nodes={self.nodes} {per_node}={devices}"
        found: dict[str, int | str] = {}
        for name, value, option in (("num_nodes", self.nodes, "--nodes"), ("devices", devices, per_node)):
            told = trainer[name]
            if f"trainer.{name}" in typed and str(told) not in (str(value), "-1", "auto"):
                raise UserError(
                    f"trainer.{name}={told} contradicts the job's {here}: leave it out, or sbatch {option}={told} ..."
                )
            found[f"trainer.{name}"] = value
        if self.cpus < devices:
            more = "--cpus-per-gpu=8" if on_gpu else "--cpus-per-task=1"
            raise UserError(f"{self.cpus} CPUs per node are too few for {devices} processes: sbatch {more} ...")
        if not self.gpus and trainer["accelerator"] == "auto":
            found["trainer.accelerator"] = "cpu"
        return found

    def srun(self, per_node: int) -> list[str]:
        """The command, up to the program, that starts so many processes on each node."""
        return [
            "srun",
            "--kill-on-bad-exit=1",  # of one rank; the others would wait for it
            "--export=ALL",  # whatever sbatch was told
            f"--nodes={self.nodes}",
            f"--ntasks={self.nodes * per_node}",
            f"--ntasks-per-node={per_node}",
            f"--cpus-per-task={self.cpus // per_node}",  # srun does not take it over from sbatch by itself
        ]

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Variables for srun: those of the batch script, and where the ranks find each other.

        Raises:
            UserError: SLURM does not name the nodes.
        """
        asked = _scontrol("show", "hostnames", environ["SLURM_JOB_NODELIST"])
        if asked.returncode or not asked.stdout.split():
            raise UserError(
                f"the names of the job's nodes are not to be had, {_complaint(asked)}: see that SLURM's commands work "
                "in the batch script, as `scontrol show hostnames` does on a login node"
            )
        # Below those that systems hand out themselves; another one for each start, as the last may still be held.
        port = 10000 + (int(self.job) + 1009 * self.restarts) % 20000
        kept = {name: value for name, value in environ.items() if name not in _NOT_FOR_SRUN}
        return {**kept, "MASTER_ADDR": asked.stdout.split()[0], "MASTER_PORT": str(port)}


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What SLURM says of a job.

    Attributes:
        name: RUNNING; COMPLETING if SLURM is ending it, whatever for.
        reason: TimeLimit, if it is for that.
        restarts: more than at its start if SLURM is requeueing it.
    """

    name: str
    reason: str
    restarts: int

    @classmethod
    def of(cls, job: str) -> "JobState":
        """Asks SLURM; a job that it does not tell about counts as running."""
        told = dict(re.findall(r"\b(JobState|Reason|Restarts)=(\S+)", _scontrol("show", "job", job).stdout))
        return cls(
            name=told.get("JobState", "RUNNING"),
            reason=told.get("Reason", "None"),
            restarts=int(told.get("Restarts", 0)),
        )


def requeue(job: str) -> str:
    """Puts a running job back into the queue; returns why SLURM does not, else nothing.

    A job that is being cancelled would come to life again: ask for its state before.
    """
    done = _scontrol("requeue", job)
    return "" if done.returncode == 0 else _complaint(done)


def _scontrol(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = ["scontrol", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, stdout="", stderr=f"scontrol cannot be run: {error.strerror}")


def _complaint(done: "subprocess.CompletedProcess[str]") -> str:
    return " ".join(done.stderr.split()) or f"scontrol exits with {done.returncode}"
