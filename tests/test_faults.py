"""The world around a run fails: it ends with one clear line, and what was saved before is intact."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import Result, command
from test_remote import Server
from test_resume import MICRO, train, weights
from test_stopping import images  # noqa: F401

from fcmae.checkpoints.format import newest_checkpoint, read_checkpoint
from fcmae.data.webdataset import WebDatasetDataModule
from fcmae.training.pretraining import PretrainModule

QUICK = ["data.num_workers=0", "save.every_n_steps=2"]


def run(folder: Path, images: Path, *options: str) -> Result:  # noqa: F811
    """The command, as if typed."""
    return command("pretrain", images, *MICRO, f"data.path={images}", f"run_dir={folder}", *QUICK, *options)


def mount(place: Path, size: str) -> Path:
    """A file system in memory."""
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted: {done.stderr.decode().strip()}")
    return place


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one and a half megabytes."""
    place = mount(tmp_path / "disk", "1500k")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk(small_disk: Path, images: Path, tmp_path: Path) -> None:  # noqa: F811
    """Some checkpoints fit, the next one does not."""
    folder = small_disk / "run"
    done = run(folder, images, "save.keep=100")
    assert done.code == 2, done.err
    told = done.err.splitlines()[-1]
    assert told.startswith(f"fcmae: cannot write {folder}/")
    assert "No space left on device; free space or mend permissions there" in told
    assert "Traceback" not in done.err
    newest = newest_checkpoint(folder)
    assert newest is not None
    saved = read_checkpoint(newest)["global_step"]
    assert 0 < saved < 12
    shutil.copytree(folder, tmp_path / "run")  # to where there is space
    again = run(tmp_path / "run", images, "save.keep=100")
    assert again.code == 0, again.err
    assert f"going on from {tmp_path / 'run' / 'checkpoints' / newest.name}" in again.err


@pytest.mark.slow
@pytest.mark.parametrize("writes", ["finish", "write_rank"])
def test_a_disk_that_fills_up_in_a_sharded_save(tmp_path: Path, images: Path, writes: str) -> None:  # noqa: F811
    """Before a rank writes its rows, or, when these are there, before the first one writes the rest."""
    script = tmp_path / "fills_the_disk.py"
    script.write_text(
        f"""
import contextlib, os
from pathlib import Path
from fcmae.command_line import launch
from fcmae.pretrain import pretrain
from fcmae.training import sharding

write = sharding.{writes}

def when_full(folder, *arguments):
    if "step=00000004" in folder.name:
        with contextlib.suppress(OSError), Path("{tmp_path}/disk/other").open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        if "{writes}" == "finish":  # it fails in the midst of its file
            os.truncate("{tmp_path}/disk/other", Path("{tmp_path}/disk/other").stat().st_size - 2 * 4096)
    return write(folder, *arguments)

sharding.{writes} = when_full
launch.run("pretrain", pretrain)
"""
    )
    disk = mount(tmp_path / "disk", "10m")
    try:
        options = [*MICRO, *QUICK, f"data.path={images}", "data.batch_size=4", f"run_dir={disk}/run", "rank_timeout=60"]
        options += ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, script, *options],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        told = [line for line in done.stderr.splitlines() if line.startswith("fcmae: ")]
        assert len(told) == 2, done.stderr  # of each rank
        assert told[0] == told[1]
        assert told[0].startswith(f"fcmae: cannot write {disk}/run/checkpoints/.epoch=0001-step=00000004.ckpt.tmp/")
        assert told[0].endswith(": No space left on device; free space or mend permissions there")
        assert "Traceback" not in done.stderr
        newest = newest_checkpoint(disk / "run")
        assert newest is not None
        assert read_checkpoint(newest)["global_step"] == 2
        assert {path.name for path in newest.parent.iterdir()} == {newest.name, "last.ckpt"}
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that can be made read-only."""
    place = mount(tmp_path / "disk", "100m")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_run_folder_that_can_no_longer_be_written(
    read_only: Path,
    images: Path,  # noqa: F811
) -> None:
    """As file servers become after an error."""
    folder = read_only / "run"
    first = run(folder, images, "+trainer.max_time=00:00:00:00")  # ends after its first step
    assert first.code == 0, first.err
    before = {file: file.read_bytes() for file in (folder / "checkpoints").iterdir()}
    subprocess.run(["mount", "-o", "remount,ro", read_only], check=True)
    done = run(folder, images)
    assert done.code == 2, done.err
    assert "Read-only file system; free space or mend permissions there" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    subprocess.run(["mount", "-o", "remount,rw", read_only], check=True)
    assert all(file.read_bytes() == content for file, content in before.items())
    assert run(folder, images).code == 0


class Hurried:
    """A clock that does not wait between the tries of a download."""

    monotonic = staticmethod(time.monotonic)

    @staticmethod
    def sleep(seconds: float) -> None:
        pass


def test_a_data_server_that_vanishes(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """In the middle of an epoch, for good; when it is back, the run goes on to the same weights."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    packed = command(
        *("shard", tmp_path, "data=folder", f"data.path={images}", f"out={tmp_path / 'shards'}", "data.val_images=8"),
        *("shard_size=4", "num_workers=0", "short_side=null", "data.image_size=64"),
    )
    assert packed.code == 0, packed
    # The server is in this process here, and one that is forked from it would hold its socket open.
    monkeypatch.setattr(WebDatasetDataModule, "forecast", lambda self, indices: None)
    server = Server(tmp_path / "shards")
    threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def options(cache: str) -> list[str]:
        places = [f"data.path={server.url}/train", f"data.val_path={server.url}/val", "data.val_images=8"]
        return [*places, "data=webdataset", f"data.cache_dir={tmp_path / cache}", "data.mixed_shards=1", *QUICK]

    train(tmp_path / "reference", images, *options("a"))
    step = PretrainModule.training_step

    def vanishing(self: PretrainModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == 2:
            server.http.shutdown()
            server.http.server_close()
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainModule, "training_step", vanishing)
        patch.setattr("fcmae.data.patience.time", Hurried)
        failed = command("pretrain", tmp_path, *MICRO, *options("b"), f"run_dir={tmp_path / 'run'}")
    assert failed.code == 1, failed
    assert f"{server.url}/train" in failed.err.splitlines()[-1]
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    back = type(server.http)(server.http.server_address, server.http.RequestHandlerClass)
    threading.Thread(target=back.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    train(tmp_path / "run", images, *options("b"))
    mine, its = weights(tmp_path / "run"), weights(tmp_path / "reference")
    assert all(torch.equal(mine[name], its[name]) for name in its)
    back.shutdown()


@pytest.mark.parametrize("jump", [-3e8, 3e8], ids=["ten years back", "ten years ahead"])
def test_a_clock_that_jumps(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:  # noqa: F811
    """The time of day decides nothing: which checkpoint is the newest, how long anything is waited for."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    train(tmp_path / "reference", images, *QUICK)
    now, step = time.time, PretrainModule.training_step
    shifted = {"by": 0.0}

    def jumping(self: PretrainModule, batch: Any, batch_idx: int) -> torch.Tensor:
        shifted["by"] = jump if self.global_step >= 5 else 0.0
        if self.global_step == 7:
            raise RuntimeError("the machine fails")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainModule, "training_step", jumping)
        patch.setattr(time, "time", lambda: now() + shifted["by"])
        with pytest.raises(RuntimeError, match="the machine fails"):
            train(tmp_path / "run", images, *QUICK)
    for file in (tmp_path / "run" / "checkpoints").glob("*step=00000006.ckpt"):  # as if written by that clock
        os.utime(file, (now() + jump, now() + jump))
    train(tmp_path / "run", images, *QUICK)
    assert "step=00000006.ckpt" in (tmp_path / "run" / "train.log").read_text()
    mine, its = weights(tmp_path / "run"), weights(tmp_path / "reference")
    assert all(torch.equal(mine[name], its[name]) for name in its)
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    assert [event for event in events if event != "saved"] == ["started", "failed", "started", "finished"]
