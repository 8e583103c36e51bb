"""All that may happen to a job on a cluster, to one of them, one after the other: it computes what it would have."""

import re
import signal
from pathlib import Path

import pytest
from cluster import FAULTY, NODE_DOWN, URGENT, Cluster, two_ranks_here
from test_killed import same_weights

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]
EPOCHS = "epochs=50"  # of four steps


def test_one_job_through_everything(cluster: Cluster, tmp_path: Path, images: Path) -> None:
    here = two_ranks_here(tmp_path / "undisturbed", images, EPOCHS)
    job = cluster.submit(
        tmp_path / "run",
        *(images, EPOCHS, "rank_timeout=15"),
        sbatch=("--nodes=2", "--time=3", "--signal=USR1@75"),  # SLURM sends it up to a minute earlier
        **{"FCMAE_PYTHON": FAULTY, "FAULTY_SLEEP": "1", "FAULTY_RANK": "1", "FCMAE_MAX_CRASHES": "2"},
    )
    job.wait_started(1)
    job.slurm("scancel", "--signal=USR1", job.number)
    job.wait_started(2)
    job.kill(0, signal.SIGKILL)
    job.wait_started(3)
    job.slurm(*URGENT)
    job.wait_started(4)
    job.kill(1, signal.SIGSTOP)  # the others give up after rank_timeout
    job.wait_started(5)
    job.slurm(*NODE_DOWN)
    job.wait_started(6)
    job.slurm("scancel", "--signal=TERM", job.number)
    job.wait_started(7)
    job.slurm("scancel", "--signal=TERM", "--batch", job.number)
    job.wait_started(9)  # by the timer
    assert job.wait_end().startswith("COMPLETED 0"), job.log
    assert same_weights(job.run_dir, here)
    starts, stops = job.journal("started"), job.journal("stopped")
    counted = re.search(r"starts: (\d+), preemptions: (\d+), crashes: (\d+)$", job.lines[-1])
    assert counted is not None, job.lines[-1]
    total, preemptions, crashes = map(int, counted.groups())
    assert (preemptions, crashes) == (total - 3, 2)
    assert total >= len(starts)  # one may be stopped before it trains
    assert [stop["signal"] for stop in stops][-1] == "SIGUSR1"
    assert {stop["step"] for stop in stops} <= {start["step"] for start in starts}, "no step is done twice"
    # SLURM wakes the stopped rank to end it, and then it misses the others: who failed first counts.
    assert [(failure["rank"], failure["host"]) for failure in job.journal("failed")][:2] == [(0, "n1"), (1, "n2")]
