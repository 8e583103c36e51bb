"""Several ranks: started as the trainer is told, alike, and none is waited for without end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from test_resume import MICRO, weights
from test_stopping import images, wait_for  # noqa: F401

from fcmae.errors import UserError
from fcmae.stopping import STOPPED
from fcmae.training.callbacks.ranks import check_same
from fcmae.training.journal import Journal
from fcmae.training.launching import check_launch

TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.num_workers=1", "epochs=100000"]
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_JOB_NUM_NODES": "2"}


def options(nodes: int, devices: Any, accelerator: str = "cpu") -> dict[str, Any]:
    return {"num_nodes": nodes, "devices": devices, "accelerator": accelerator}


def slurm(tasks: str) -> dict[str, str]:
    """What srun tells the processes that it starts."""
    count = sum(int(n) * int(x or 1) for n, _, x in (part.rstrip(")").partition("(x") for part in tasks.split(",")))
    return {**STEP, "SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_TASKS_PER_NODE": tasks}


def torchrun(world: int, here: int) -> dict[str, str]:
    return {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(here)}


@pytest.mark.parametrize(
    ("trainer", "environ", "processes", "environment"),
    [
        (options(1, 1), {}, 1, LightningEnvironment),
        (options(1, "auto"), {}, 1, LightningEnvironment),
        (options(1, 4), {}, 4, LightningEnvironment),
        (options(1, [0, 2]), {}, 2, LightningEnvironment),
        (options(2, 4), {"MASTER_ADDR": "n1"}, 8, LightningEnvironment),
        (options(2, 4), slurm("4(x2)"), 8, SLURMEnvironment),
        (options(2, 1), slurm("1(x2)"), 2, SLURMEnvironment),
        (options(1, 3), slurm("3"), 3, SLURMEnvironment),
        (options(3, 2), torchrun(6, 2), 6, TorchElasticEnvironment),
        # in a job of one node, without srun or in a shell that srun started, Lightning starts the other processes
        (
            options(1, 8),
            {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "8"},
            8,
            LightningEnvironment,
        ),
        (options(1, 8), {**STEP, "SLURM_JOB_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}, 8, LightningEnvironment),
    ],
)
def test_what_fits_is_taken(
    trainer: dict[str, Any], environ: dict[str, str], processes: int, environment: type
) -> None:
    launch = check_launch(trainer, environ)
    assert launch.processes == processes
    assert type(launch.environment) is environment
    assert getattr(launch.environment, "auto_requeue", False) is False


@pytest.mark.parametrize(
    ("trainer", "environ", "told"),
    [
        (options(1, 4), slurm("4(x2)"), "add trainer.num_nodes=2 trainer.devices=4"),
        (options(2, 1), slurm("4(x2)"), "add trainer.num_nodes=2 trainer.devices=4"),
        (options(1, 1), torchrun(8, 8), "add trainer.num_nodes=1 trainer.devices=8"),
        (options(2, 4), slurm("4,3"), "start as many on each, with --ntasks-per-node"),
        (options(2, 4), {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "8"}, "put srun before it"),
        (options(1, 4), {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}, "srun --ntasks-per-node=4 python -m"),
        (options(2, 4), {}, "start the run with torchrun, or with srun"),
    ],
)
def test_what_would_wait_for_ever_is_refused_with_what_fits(
    trainer: dict[str, Any], environ: dict[str, str], told: str
) -> None:
    with pytest.raises(UserError) as error:
        check_launch(trainer, environ)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_ranks_that_differ_are_refused() -> None:
    facts = {"code": "fcmae 1 (a)", "configuration": "b", "set of images": "40 images, c"}
    check_same([("n1", facts), ("n2", dict(facts))])
    with pytest.raises(UserError, match="rank 2 on n2 has another set of images than rank 0 on n1: 39 images, d, not"):
        check_same([("n1", facts), ("n1", facts), ("n2", {**facts, "set of images": "39 images, d"})])


class Two:
    """Two ranks on this machine, of which Lightning starts the second."""

    def __init__(self, run: Path, images: Path, *options: str) -> None:  # noqa: F811
        command = [sys.executable, "-m", "fcmae.pretrain", *MICRO, f"data.path={images}", f"run_dir={run}", *TWO]
        self.journal = Journal(run / "journal.jsonl")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [word for word in [*command, "save.keep=2", *options] if word != "trainer=cpu"]
        self.process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        wait_for(lambda: any(entry["event"] == "saved" for entry in self.journal.read()))
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self.second = next(int(pid) for pid in children if f"{run}" in Path(f"/proc/{pid}/cmdline").read_text())

    def end(self, seconds: float) -> str:
        """What it said, once all of it is over."""
        _, err = self.process.communicate(timeout=seconds)  # until nobody holds standard error open any more
        return err


LINUX = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc, to find the second rank")


@LINUX
@pytest.mark.parametrize("to", ["second", pytest.param("first", marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_stops_all(tmp_path: Path, images: Path, to: str) -> None:  # noqa: F811
    ranks = Two(tmp_path / "run", images)
    os.kill(ranks.process.pid if to == "first" else ranks.second, signal.SIGUSR1)
    err = ranks.end(60)
    assert ranks.process.returncode == STOPPED, err
    assert "Traceback" not in err
    saved, stopped = ranks.journal.read()[-2:]
    assert (stopped["event"], stopped["signal"], stopped["step"]) == ("stopped", "SIGUSR1", saved["step"])


@LINUX
@pytest.mark.parametrize(
    ("fault", "victim"),
    [("KILL", 1), pytest.param("KILL", 0, marks=pytest.mark.slow), pytest.param("STOP", 1, marks=pytest.mark.slow)],
)
def test_a_lost_rank_is_named_and_ends_the_run(tmp_path: Path, images: Path, fault: str, victim: int) -> None:  # noqa: F811
    ranks = Two(tmp_path / "run", images, "rank_timeout=10")
    time.sleep(3)  # a beat a second tells how far each is
    started = time.monotonic()
    os.kill([ranks.process.pid, ranks.second][victim], getattr(signal, f"SIG{fault}"))
    err = ranks.end(60)
    assert time.monotonic() - started < (30 if fault == "KILL" else 45)
    assert ranks.process.returncode == (1 if victim else -signal.SIGKILL), err
    last = err.splitlines()[-1]
    assert last.startswith(f"fcmae: rank {victim} on "), err
    assert "no longer answers" in last
    failed = [entry for entry in ranks.journal.read() if entry["event"] == "failed"]
    assert [(entry["rank"], entry["error"]) for entry in failed] == [(victim, "no longer answers")]
    assert failed[0]["step"] >= 1


@LINUX
def test_another_installation_on_one_rank_is_refused(tmp_path: Path, images: Path) -> None:  # noqa: F811
    """Both ranks say so, in the same line, before anything is computed."""
    script = tmp_path / "other.py"
    script.write_text(
        "import os\n"
        "from fcmae import launch\n"
        "from fcmae.pretrain import pretrain\n"
        "from fcmae.training import launching\n"
        "if os.environ.get('LOCAL_RANK') == '1':\n"
        "    launching._code = lambda: 'another'\n"
        "launch.run('pretrain', pretrain)\n"
    )
    words = [*MICRO, *TWO, f"data.path={images}", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, script, *(word for word in words if word != "trainer=cpu")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("fcmae: ")]
    assert told
    assert all("has another code than rank 0" in line and "(another), not fcmae" in line for line in told)
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    assert set(events) == {"failed"}


@pytest.mark.slow
def test_torchrun_starts_the_same_run(tmp_path: Path, images: Path) -> None:  # noqa: F811
    """The weights of ranks that Lightning has started; another geometry than torchrun's is refused."""
    words = [word for word in (*MICRO, f"data.path={images}", *TWO) if word not in ("trainer=cpu", "epochs=100000")]

    def run(name: str, *launcher: str) -> "subprocess.CompletedProcess[str]":
        command = [*launcher, "fcmae.pretrain", *words, f"run_dir={tmp_path / name}", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m"]
    options = ["save.keep=1"]
    for name, launcher in (("lightning", [sys.executable, "-m"]), ("torchrun", torchrun)):
        done = run(name, *launcher)
        assert done.returncode == 0, done.stderr
    mine, its = weights(tmp_path / "torchrun"), weights(tmp_path / "lightning")
    assert all(torch.equal(mine[name], its[name]) for name in its)
    options = ["trainer.devices=1"]
    refused = run("refused", *torchrun)
    assert "fcmae: torchrun started 2 processes on each of 1 nodes" in refused.stderr
    assert "add trainer.num_nodes=1 trainer.devices=2" in refused.stderr
    assert not (tmp_path / "refused").exists()
