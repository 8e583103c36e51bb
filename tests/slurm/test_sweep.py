"""A sweep whose points are jobs of a SLURM: one is stopped, and goes on in the same job."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import MICRO, Cluster

from fcmae.training.journal import Journal

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_a_stopped_point_of_a_sweep_goes_on(
    cluster: Cluster, tmp_path: Path, images: Path, request: pytest.FixtureRequest
) -> None:
    sizes = ["gpus_per_node=null", "cpus_per_task=1", "timeout_min=10"]
    launcher = ["hydra/launcher=slurm", *(f"hydra.launcher.{size}" for size in sizes)]
    command = [sys.executable, "-m", "fcmae.pretrain", "-m", *launcher, *MICRO, "data=folder", f"data.path={images}"]
    command += ["trainer=cpu", "epochs=250", "model.decoder_depth=1,2", "run_name=depth${model.decoder_depth}"]
    sweep = subprocess.Popen(command, cwd=tmp_path, env=cluster.environment, stderr=subprocess.PIPE, text=True)
    journals = [Journal(tmp_path / "outputs" / "pretrain" / f"depth{n}" / "journal.jsonl") for n in (1, 2)]
    end = time.monotonic() + 300
    request.addfinalizer(sweep.kill)  # should it be left over

    def events(journal: Journal) -> list[str]:
        return [entry["event"] for entry in journal.read() if entry["event"] != "saved"]

    while any(events(journal) != ["started"] for journal in journals):
        assert time.monotonic() < end
        assert sweep.poll() is None, sweep.communicate()
        time.sleep(0.2)
    queue = ["squeue", "--noheader", "--states=RUNNING", "--format=%i"]
    running = subprocess.run(queue, env=cluster.environment, capture_output=True, text=True, check=True).stdout.split()
    first = next(job for job in running if job.endswith("_0"))
    subprocess.run(["scancel", "--signal=USR1", first], env=cluster.environment, check=True)
    _, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, err
    assert [events(journal) for journal in journals] == [
        ["started", "stopped", "started", "finished"],
        ["started", "finished"],
    ]
    entries = journals[0].read()
    stopped = next(entry for entry in entries if entry["event"] == "stopped")
    again = [entry for entry in entries if entry["event"] == "started"][1]
    assert again["step"] == stopped["step"]
