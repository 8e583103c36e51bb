"""A SLURM of two nodes, and what tests do with the jobs on it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "scripts"
MICRO = [
    *("+model=custom", "model.depths=[1,1,1,1]", "model.dims=[8,8,16,16]", "model.decoder_dim=16"),
    *("model.drop_path_rate=0.3", "data.image_size=64", "data.batch_size=4", "data.val_images=8"),
    *("optim.warmup_epochs=1", "save.every_n_steps=3", "pictures=0", "effective_batch=8", "data.num_workers=0"),
]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
STUB = f"bash {HERE / 'stub.sh'}"
URGENT = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
NODE_DOWN = ["scontrol", "update", "nodename=n2", "state=down", "reason=test"]  # it comes back by itself
FAULTY = f"{sys.executable} {HERE / 'faulty.py'}"


def why_not() -> str:
    """What is missing for a SLURM of our own; nothing if it can be had."""
    if os.geteuid() != 0:
        return "a SLURM of our own needs root"
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged", "ip") if not shutil.which(name, path=path)]
    if missing:
        return f"{', '.join(missing)} not installed; see the head of tests/slurm/slurm_up.sh"
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True, check=False).returncode:
        return "this machine does not let root make namespaces, which the nodes need"
    return ""


def until(true: Callable[[], Any], job: "Job", seconds: float = 240) -> Any:
    """Waits until something is true of a job, and returns it; no longer than the job lasts."""
    end = time.monotonic() + seconds
    while not (value := true()):
        over = job.state()["JobState"] in ENDED
        assert true() or not over, f"not before the end of the job: {job.log}"
        assert time.monotonic() < end, f"not within {seconds} s: {job.log}"
        time.sleep(0.2)
    return value


def two_ranks_here(run_dir: Path, images: Path, *overrides: str) -> Path:
    """Trains with two ranks on this machine, without SLURM."""
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    options = [*MICRO, *two, "data=folder", f"data.path={images}", *overrides, f"run_dir={run_dir}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "fcmae.pretrain", *options], env=environment, check=True, timeout=300)
    return run_dir


@dataclass(frozen=True)
class Job:
    """A submitted job and its run."""

    number: str
    run_dir: Path
    environment: dict[str, str]

    @property
    def log(self) -> str:
        file = self.run_dir.with_suffix(".log")
        return file.read_text() if file.is_file() else ""

    @property
    def lines(self) -> list[str]:
        """What the supervisor says."""
        return re.findall(r"^fcmae\.job \S+ \S+ (.*)", self.log, re.MULTILINE)

    def slurm(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout

    def state(self) -> dict[str, str]:
        return dict(re.findall(r"(\S+?)=(\S*)", self.slurm("scontrol", "show", "job", self.number)))

    def journal(self, event: str) -> list[dict[str, Any]]:
        file = self.run_dir / "journal.jsonl"
        entries = map(json.loads, file.read_text().splitlines()) if file.is_file() else ()
        return [entry for entry in entries if entry["event"] == event]

    def saves(self) -> int:
        return len(self.journal("saved"))

    def wait_started(self, start: int) -> None:
        """Waits for so many starts of the run, and for something that the last of them has saved."""
        until(lambda: len(self.journal("started")) >= start, self)
        saves = self.saves()
        until(lambda: self.saves() > saves, self)

    def wait_stubs(self) -> None:
        """Waits until both ranks of a stub wait for a signal."""
        until(lambda: self.log.count(": waits") == 2, self)

    def wait_end(self) -> str:
        """Waits until SLURM is done with the job; returns `state exit-code restarts`."""
        until(lambda: self.state()["JobState"] in ENDED, self, seconds=600)
        state = self.state()
        return f"{state['JobState']} {state['ExitCode'].partition(':')[0]} {state['Restarts']}"

    def kill(self, rank: int, signum: signal.Signals) -> None:
        """Signals the process of a rank, which has noted its own id."""
        os.kill(int((self.run_dir.parent / f"{self.run_dir.name}.rank{rank}").read_text()), signum)


@dataclass(frozen=True)
class Cluster:
    """A SLURM that runs.

    Attributes:
        folder: of its state.
        environment: for SLURM's commands.
    """

    folder: Path
    environment: dict[str, str]

    @classmethod
    def start(cls, folder: Path) -> "Cluster":
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        knobs = {"SLURM_TEST_DIR": str(folder), "SLURM_TEST_CPUS": "64", "SLURM_TEST_GPUS": "2"}
        done = subprocess.run(
            [str(HERE / "slurm_up.sh")], env={**outside, **knobs}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return cls(folder, {**outside, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": path, "OMP_NUM_THREADS": "1"})

    def stop(self) -> None:
        environment = {**self.environment, "SLURM_TEST_DIR": str(self.folder)}
        subprocess.run([str(HERE / "slurm_down.sh")], env=environment, check=True, timeout=60)

    def submit(
        self, run_dir: Path, data: Path, *overrides: str, sbatch: tuple[str, ...] = ("--nodes=2",), **environment: str
    ) -> Job:
        """`sbatch OPTIONS scripts/pretrain.slurm OVERRIDES`."""
        variables = {**self.environment, "FAULTY_PIDS": str(run_dir), **environment}
        command = ["sbatch", "--parsable", f"--output={run_dir.with_suffix('.log')}", *sbatch]
        command += [
            str(SCRIPTS / "pretrain.slurm"),
            *MICRO,
            "data=folder",
            f"data.path={data}",
            *overrides,
            f"run_dir={run_dir}",
        ]
        done = subprocess.run(command, env=variables, cwd=run_dir.parent, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return Job(done.stdout.strip(), run_dir, self.environment)
