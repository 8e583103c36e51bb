"""A job on a real SLURM: it survives what it should, ends where it must, and computes what one machine computes."""

import signal
import sys
import time
from pathlib import Path

import pytest
from cluster import FAULTY, NODE_DOWN, STUB, URGENT, Cluster, Job, until
from test_killed import same_weights

pytestmark = pytest.mark.slurm
STOPS = {"USR1": ["--signal=USR1"], "TERM": ["--signal=TERM"], "TERM to the script": ["--signal=TERM", "--batch"]}


def test_a_stop_and_a_kill_change_nothing(cluster: Cluster, tmp_path: Path, images: Path, undisturbed: Path) -> None:
    """With one rank slower than the other, where a save inside of the signal handler would wait for ever."""
    job = cluster.submit(
        tmp_path / "run",
        *(images, "epochs=6", "rank_timeout=20", "trainer.devices=1"),
        **{"FCMAE_PYTHON": FAULTY, "FAULTY_SLEEP": "0.5", "FAULTY_RANK": "1"},
    )
    job.wait_started(1)
    job.slurm("scancel", "--signal=USR1", job.number)
    job.wait_started(2)
    assert [stop["signal"] for stop in job.journal("stopped")] == ["SIGUSR1"]
    assert job.journal("started")[1]["step"] == job.journal("stopped")[0]["step"], "no step is done twice"
    job.kill(1, signal.SIGKILL)
    assert job.wait_end() == "COMPLETED 0 2", job.log
    assert same_weights(job.run_dir, undisturbed)
    assert job.lines[-1].endswith("done; starts: 3, preemptions: 1, crashes: 1")
    (crash,) = [line for line in job.lines if "crashed" in line]
    assert "(rank 1 on n2 at step" in crash
    assert not list(tmp_path.glob("run.job*"))


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, tmp_path: Path, images: Path) -> None:
    job = cluster.submit(
        tmp_path / "run",
        *(images, "epochs=600"),
        **{"FCMAE_PYTHON": FAULTY, "FAULTY_SLEEP": "0.3"},
    )
    job.wait_started(1)
    job.slurm("scancel", job.number)
    until(lambda: job.journal("stopped"), job)
    assert job.wait_end().startswith("CANCELLED")
    time.sleep(4)
    assert job.wait_end().split()[::2] == ["CANCELLED", "0"], job.log  # and not started again
    assert "SLURM ends the job, so it is not requeued" in job.lines[-1]
    assert job.journal("stopped")[0]["step"] == max(save["step"] for save in job.journal("saved"))


@pytest.fixture(scope="module")
def at_once(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Jobs that need little of the machine, all submitted together; by what happens to them."""
    folder = tmp_path_factory.mktemp("jobs")
    sbatch = {
        "timer": ["--time=1", "--signal=B:USR1@45"],
        "timer of the tasks": ["--time=1", "--signal=USR1@45"],
        "not requeued": ["--no-requeue"],
    }
    stubs = {
        "crashes": {"STUB_CODE": "3", "STUB_RESTARTS": "9"},
        "GPUs": {"FCMAE_PYTHON": "bash -c 'echo rank $SLURM_PROCID: $SLURM_CPUS_PER_TASK CPUs, ${*: -2}' bash"},
        "found by the ranks": {"FCMAE_PYTHON": sys.executable},
    }
    typed = {"found by the job": ["epocs=3"], "found by the ranks": [f"data.path={folder / 'nowhere'}"]}
    sbatch["crashes"] = ["--nodes=1"]  # srun ends the others of several, and tells the highest exit code
    sbatch["GPUs"] = ["--gpus-per-node=2", "--cpus-per-gpu=3"]
    return {
        name: cluster.submit(
            folder / name.replace(" ", "_"),
            *(folder, *typed.get(name, [])),
            sbatch=("--nodes=2", *sbatch.get(name, [])),
            **{"FCMAE_PYTHON": STUB, **stubs.get(name, {})},
        )
        for name in dict.fromkeys([*STOPS, *sbatch, *stubs, *typed])
    }


@pytest.mark.parametrize("how", ["USR1", "TERM", "TERM to the script", "timer", "timer of the tasks"])
def test_what_stops_a_job_requeues_it_once(at_once: dict[str, Job], how: str) -> None:
    job = at_once[how]
    if how in STOPS:
        job.wait_stubs()
        job.slurm("scancel", *STOPS[how], job.number)
    assert job.wait_end() == "COMPLETED 0 1", job.log
    assert job.lines[-1].endswith("done; starts: 2, preemptions: 1, crashes: 0")
    assert job.log.count("stopped") == 3, "both stubs, and the job says so"


def test_crashes_with_nothing_saved_end_the_job(at_once: dict[str, Job]) -> None:
    job = at_once["crashes"]
    assert job.wait_end() == "FAILED 3 2", job.log
    assert job.lines[-1].endswith(
        "given up after 3 crashes with nothing newer saved; starts: 3, preemptions: 0, crashes: 3"
    )


def test_a_job_that_may_not_be_requeued_says_so(at_once: dict[str, Job]) -> None:
    job = at_once["not requeued"]
    job.wait_stubs()
    job.slurm("scancel", "--signal=USR1", job.number)
    assert job.wait_end() == "FAILED 75 0", job.log
    assert "SLURM does not requeue it (Requested operation is presently disabled" in job.lines[-1]


def test_a_mistake_ends_the_job_at_once(at_once: dict[str, Job]) -> None:
    job = at_once["found by the job"]
    assert job.wait_end() == "FAILED 2 0", job.log
    assert job.log.startswith("fcmae: epocs is not an option; did you mean epochs?\n")
    job = at_once["found by the ranks"]
    assert job.wait_end() == "FAILED 2 0", job.log
    assert "refused, so it is not requeued: " in job.lines[-1]
    assert "nowhere" in job.lines[-1]


def test_a_node_of_gpus_gets_a_process_for_each(at_once: dict[str, Job]) -> None:
    """The GPUs are plain files; what counts here is how many processes SLURM lets start, and with how many CPUs."""
    job = at_once["GPUs"]
    assert job.wait_end() == "COMPLETED 0 0", job.log
    told = sorted(line for line in job.log.splitlines() if line.startswith("rank"))
    assert told == [f"rank {rank}: 3 CPUs, trainer.num_nodes=2 trainer.devices=2" for rank in range(4)]


@pytest.mark.parametrize("how", ["urgent", "node"])
def test_preemption_and_a_lost_node_requeue_once(cluster: Cluster, tmp_path: Path, how: str) -> None:
    job = cluster.submit(tmp_path / "run", tmp_path, FCMAE_PYTHON=STUB)
    job.wait_stubs()
    job.slurm(*(URGENT if how == "urgent" else NODE_DOWN))
    assert job.wait_end() == "COMPLETED 0 1", job.log
    assert job.lines[-1].endswith("done; starts: 2, preemptions: 1, crashes: 0")
    assert ("SLURM itself requeues the job" in job.log) == (how == "node")
