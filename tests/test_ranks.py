"""Several ranks: started as the trainer is told, alike, and none is waited for without end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from test_resume import MICRO, weights
from test_stopping import images, wait_for  # noqa: F401

from fcmae.errors import UserError, in_a_line
from fcmae.stopping import STOPPED
from fcmae.training.callbacks.ranks import check_same
from fcmae.training.journal import Journal
from fcmae.training.launching import check_launch, leave_signals_to_us

TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.num_workers=1", "epochs=100000"]
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_JOB_NUM_NODES": "2"}


def options(nodes: Any, devices: Any, accelerator: str = "cpu") -> dict[str, Any]:
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
        (options(1, "0,1"), {}, 2, LightningEnvironment),
        (options(1, "1,"), {}, 1, LightningEnvironment),
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
        (options(1, 8), {**STEP, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}, 8, LightningEnvironment),
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
        (options(1, "all"), {}, "trainer.devices=all must be a number, a list such as [0,1], auto, or -1 for all"),
        (options(1, None), {}, "trainer.devices=None must be a number"),
        (options("two", 1), {}, "trainer.num_nodes=two must be a number"),
    ],
)
def test_what_would_wait_for_ever_is_refused_with_what_fits(
    trainer: dict[str, Any], environ: dict[str, str], told: str
) -> None:
    with pytest.raises(UserError) as error:
        check_launch(trainer, environ)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["register_signal_handlers", "_broadcast_sigterm_tensor"])
def test_a_lightning_that_calls_its_handling_of_signals_otherwise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
    leave_signals_to_us(trainer)
    assert connector.register_signal_handlers() is loop._broadcast_sigterm_tensor() is None
    owner = connector if "handlers" in name else loop
    delattr(owner, name)
    monkeypatch.delattr(type(owner), name)
    with pytest.raises(UserError, match=rf"Lightning {re.escape(L.__version__)} has no {name}, by which signals"):
        leave_signals_to_us(trainer)


def test_ranks_that_differ_are_refused() -> None:
    facts = {"code": "fcmae 1 (a)", "configuration": "b", "set of images": "40 images, c"}
    check_same([("n1", facts), ("n2", dict(facts))])
    with pytest.raises(UserError, match="rank 2 on n2 has another set of images than rank 0 on n1: 39 images, d, not"):
        check_same([("n1", facts), ("n1", facts), ("n2", {**facts, "set of images": "39 images, d"})])
    with pytest.raises(
        UserError, match=r"rank 1 on n2 has another data\.batch_size .* the smaller number instead of auto"
    ):
        check_same([("n1", {"data.batch_size": "64"}), ("n2", {"data.batch_size": "32"})])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\nb"), "a"),
        (KeyError(), "KeyError"),
        (RuntimeError(" \n"), "RuntimeError"),
        (UserError("Caught UserError in DataLoader worker process 0.\nTrace\nfcmae.errors.UserError: a: b"), "a: b"),
    ],
)
def test_an_error_in_a_line(error: Exception, line: str) -> None:
    assert in_a_line(error) == line


class Local:
    """Ranks on this machine, of which Lightning starts all but the first."""

    def __init__(self, run: Path, images: Path, *options: str, ranks: int = 2) -> None:  # noqa: F811
        words = [word for word in TWO if not word.startswith(("trainer.devices=", "effective_batch="))]
        command = [sys.executable, "-m", "fcmae.pretrain", *MICRO, f"data.path={images}", f"run_dir={run}", *words]
        self.journal = Journal(run / "journal.jsonl")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [word for word in [*command, "save.keep=2", *options] if word != "trainer=cpu"]
        self.process = subprocess.Popen(
            [*command, f"trainer.devices={ranks}"],
            env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        wait_for(lambda: any(entry["event"] == "saved" for entry in self.journal.read()))
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ranks_of = {_local_rank(int(pid)): int(pid) for pid in children}
        self.pids = [self.process.pid, *(ranks_of[rank] for rank in range(1, ranks))]

    def end(self, seconds: float) -> str:
        """What it said, once all of it is over."""
        _, err = self.process.communicate(timeout=seconds)  # until nobody holds standard error open any more
        return err


def _local_rank(pid: int) -> int | None:
    """As Lightning tells the processes that it starts; those that read images are not told."""
    variables = dict(one.partition("=")[::2] for one in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    return int(variables["LOCAL_RANK"]) if "LOCAL_RANK" in variables else None


LINUX = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc, to find the other ranks")


@LINUX
@pytest.mark.parametrize("to", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_stops_all(tmp_path: Path, images: Path, to: int) -> None:  # noqa: F811
    ranks = Local(tmp_path / "run", images)
    os.kill(ranks.pids[to], signal.SIGUSR1)
    err = ranks.end(60)
    assert ranks.process.returncode == STOPPED, err
    assert "Traceback" not in err
    saved, stopped = ranks.journal.read()[-2:]
    assert (stopped["event"], stopped["signal"], stopped["step"]) == ("stopped", "SIGUSR1", saved["step"])


@LINUX
@pytest.mark.parametrize(
    ("fault", "victim", "number"),
    [
        ("KILL", 1, 2),
        pytest.param("KILL", 0, 2, marks=pytest.mark.slow),
        pytest.param("STOP", 1, 2, marks=pytest.mark.slow),
        pytest.param("STOP", 0, 2, marks=pytest.mark.slow),
        pytest.param("KILL", 2, 4, marks=pytest.mark.slow),
        pytest.param("KILL", 0, 4, marks=pytest.mark.slow),
        pytest.param("STOP", 2, 4, marks=pytest.mark.slow),
    ],
)
def test_a_lost_rank_is_named_and_ends_the_run(
    tmp_path: Path,
    images: Path,  # noqa: F811
    fault: str,
    victim: int,
    number: int,
) -> None:
    """All that are left say the same, and one of them writes it down."""
    if fault == "STOP" and not hasattr(dist, "set_timeout"):
        pytest.skip("this torch cannot shorten the waiting of gloo's ranks for each other")
    ranks = Local(tmp_path / "run", images, "rank_timeout=10", ranks=number)
    time.sleep(3)  # a beat a second tells how far each is
    started = time.monotonic()
    os.kill(ranks.pids[victim], getattr(signal, f"SIG{fault}"))
    if (fault, victim) == ("STOP", 0):  # its children end; nobody is there to end it
        wait_for(lambda: not any(_lives(pid) for pid in ranks.pids[1:]), 60)
        os.kill(ranks.pids[0], signal.SIGKILL)
    err = ranks.end(60)
    assert time.monotonic() - started < (30 if fault == "KILL" else 60)
    assert ranks.process.returncode == (1 if victim else -signal.SIGKILL), err
    told = [line for line in err.splitlines() if line.startswith("fcmae: ")]
    assert len(told) == number - 1, err
    assert all(line.startswith(f"fcmae: rank {victim} on ") and "no longer answers" in line for line in told), err
    failed = [entry for entry in ranks.journal.read() if entry["event"] == "failed"]
    assert [(entry["rank"], entry["error"]) for entry in failed] == [(victim, "no longer answers")]
    assert failed[0]["step"] >= 1


def _lives(pid: int) -> bool:
    """Whether a process is there, and not only waits to be asked how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


FAULTS = """
import os, signal, sys, time
from fcmae.command_line import launch
from fcmae.errors import UserError
from fcmae.pretrain import pretrain
from fcmae.training.callbacks import checkpoints
from fcmae.training.pretraining import PretrainModule
"""


@LINUX
@pytest.mark.skipif(
    not hasattr(dist, "set_timeout"), reason="this torch cannot shorten the waiting of gloo's ranks for each other"
)
@pytest.mark.slow
def test_a_rank_that_hangs_is_named_though_it_lives(tmp_path: Path, images: Path) -> None:  # noqa: F811
    """It is not the one that waited for it in vain."""
    script = tmp_path / "hangs.py"
    script.write_text(
        f"""{FAULTS}
step = PretrainModule.training_step
def hangs(self, batch, index):
    if os.environ.get("LOCAL_RANK") == "1" and self.global_step == 2:
        time.sleep(100)
    return step(self, batch, index)
PretrainModule.training_step = hangs
launch.run("pretrain", pretrain)
"""
    )
    done = run_script(script, tmp_path / "run", images, "rank_timeout=5")
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("fcmae: rank 1 on "), done.stderr
    assert "does not go on: it lives, and waits for a disk" in last
    failed = [one for one in Journal(tmp_path / "run" / "journal.jsonl").read() if one["event"] == "failed"]
    assert [(one["rank"], one["step"], one["error"]) for one in failed] == [(1, 2, "does not go on")]


PROBE = f"""{FAULTS}
from fcmae.training.callbacks.online_probe import OnlineProbe
def takes_long(self, module):
    if "FCMAE_TEST_DIES" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(9)
    return 0.5
OnlineProbe.score = takes_long
launch.run("pretrain", pretrain)
"""


@LINUX
@pytest.mark.slow
def test_a_probe_may_take_longer_than_a_rank_may_be_silent(tmp_path: Path, images: Path) -> None:  # noqa: F811
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    short = ["epochs=1", "optim.warmup_epochs=0", "probe.data=digits", "rank_timeout=3"]
    done = run_script(script, tmp_path / "run", images, *short)
    assert done.returncode == 0, done.stderr
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["val_knn_acc1"] for line in logged if "val_knn_acc1" in line] == [0.5]


@LINUX
@pytest.mark.slow
def test_a_rank_that_dies_in_its_probe_is_not_waited_for(
    tmp_path: Path,
    images: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FCMAE_TEST_DIES", "1")
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    short = ["epochs=1", "optim.warmup_epochs=0", "probe.data=digits", "rank_timeout=60"]
    start = time.monotonic()
    done = run_script(script, tmp_path / "run", images, *short)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert re.search(r"fcmae: rank 0 on .* no longer answers", done.stderr), done.stderr
    assert time.monotonic() - start < 60


@LINUX
@pytest.mark.slow
def test_a_failure_in_saving_what_a_signal_stopped_is_told_by_all(tmp_path: Path, images: Path) -> None:  # noqa: F811
    script = tmp_path / "cannot_save.py"
    script.write_text(
        f"""{FAULTS}
save, step = checkpoints.Checkpoints._save, PretrainModule.training_step
def stops(self, batch, index):
    if os.environ.get("LOCAL_RANK") == "1" and self.global_step == 2:
        os.kill(os.getpid(), signal.SIGUSR1)
    return step(self, batch, index)
def fails(self, trainer, module):
    if trainer.global_step >= 3 and trainer.is_global_zero:
        raise UserError("no space")
    save(self, trainer, module)
PretrainModule.training_step, checkpoints.Checkpoints._save = stops, fails
launch.run("pretrain", pretrain)
"""
    )
    done = run_script(script, tmp_path / "run", images, "save.every_n_steps=1000", "rank_timeout=20")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    told = sorted(line for line in done.stderr.splitlines() if line.startswith("fcmae: "))
    assert told[0] == "fcmae: no space"
    assert told[1].startswith("fcmae: rank 0 on ")
    assert told[1].endswith("failed at step 3: no space")
    failed = [one for one in Journal(tmp_path / "run" / "journal.jsonl").read() if one["event"] == "failed"]
    assert [(one["rank"], one["error"]) for one in failed] == [(0, "no space")]


@LINUX
@pytest.mark.parametrize(
    ("error", "code"), [("UserError('no such thing')", 2), pytest.param("KeyError()", 1, marks=pytest.mark.slow)]
)
def test_what_fails_on_one_rank_is_told_by_all(tmp_path: Path, images: Path, error: str, code: int) -> None:  # noqa: F811
    script = tmp_path / "fails.py"
    script.write_text(
        "import os\n"
        "from fcmae.command_line import launch\n"
        "from fcmae.errors import UserError\n"
        "from fcmae.pretrain import pretrain\n"
        "from fcmae.training.pretraining import PretrainModule\n"
        "step = PretrainModule.training_step\n"
        "def fails(self, batch, index):\n"
        f"    if os.environ.get('LOCAL_RANK') == '1' and self.global_step == 2: raise {error}\n"
        "    return step(self, batch, index)\n"
        "PretrainModule.training_step = fails\n"
        "launch.run('pretrain', pretrain)\n"
    )
    done = run_script(script, tmp_path / "run", images)
    assert done.returncode == code, done.stderr
    what = "no such thing" if code == 2 else "KeyError"
    told = [line for line in done.stderr.splitlines() if line.startswith("fcmae: ")]
    assert [line for line in told if line.startswith("fcmae: rank 1 on ") and f"failed at step 2: {what}" in line], told
    events = Journal(tmp_path / "run" / "journal.jsonl").read()
    assert [(one["event"], one.get("rank"), one.get("error")) for one in events if one["event"] != "saved"][1:] == [
        ("failed", 1, what)
    ]


@pytest.mark.slow
def test_two_ranks_log_to_one_wandb_run(tmp_path: Path, images: Path) -> None:  # noqa: F811
    words = [*MICRO, *TWO, f"data.path={images}", f"run_dir={tmp_path / 'run'}", "logger=wandb"]
    command = [
        sys.executable,
        "-m",
        "fcmae.pretrain",
        *(word for word in words if word not in ("trainer=cpu", TWO[-1])),
    ]
    done = subprocess.run(
        [*command, "logger.wandb.offline=true", "epochs=1"], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    name = (tmp_path / "run" / "wandb_run_id.txt").read_text()
    (found,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert found.name.endswith(f"-{name}")


def run_script(script: Path, run: Path, images: Path, *options: str) -> "subprocess.CompletedProcess[str]":  # noqa: F811
    words = [*MICRO, *TWO, f"data.path={images}", f"run_dir={run}", *options]
    words = [word for word in words if word != "trainer=cpu"]
    return subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=120, check=False)


@LINUX
@pytest.mark.slow
def test_another_installation_on_one_rank_is_refused(tmp_path: Path, images: Path) -> None:  # noqa: F811
    """Both ranks say so, in the same line, before anything is computed."""
    script = tmp_path / "other.py"
    script.write_text(
        "import os\n"
        "from fcmae.command_line import launch\n"
        "from fcmae.pretrain import pretrain\n"
        "from fcmae.training import launching\n"
        "if os.environ.get('LOCAL_RANK') == '1':\n"
        "    launching._code = lambda: 'another'\n"
        "launch.run('pretrain', pretrain)\n"
    )
    done = run_script(script, tmp_path / "run", images)
    assert done.returncode == 2, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("fcmae: ")]
    assert told
    assert all("has another code than rank 0" in line and "(another), not fcmae" in line for line in told)
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    assert events == ["failed"]


@pytest.mark.slow
def test_torchrun_starts_the_same_run(tmp_path: Path, images: Path) -> None:  # noqa: F811
    """The weights of ranks that Lightning has started; another geometry than torchrun's is refused."""
    words = [word for word in (*MICRO, f"data.path={images}", *TWO) if word not in ("trainer=cpu", "epochs=100000")]

    def run(name: str, *launcher: str) -> "subprocess.CompletedProcess[str]":
        command = [*launcher, "fcmae.pretrain", *words, f"run_dir={tmp_path / name}", *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)

    starter = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m"]
    more = ["save.keep=1"]
    for name, launcher in (("lightning", [sys.executable, "-m"]), ("torchrun", starter)):
        done = run(name, *launcher)
        assert done.returncode == 0, done.stderr
    mine, its = weights(tmp_path / "torchrun"), weights(tmp_path / "lightning")
    assert all(torch.equal(mine[name], its[name]) for name in its)
    more = ["trainer.devices=1"]
    refused = run("refused", *starter)
    assert "fcmae: torchrun started 2 processes on each of 1 nodes" in refused.stderr
    assert "add trainer.num_nodes=1 trainer.devices=2" in refused.stderr
    assert not (tmp_path / "refused").exists()
