"""A run that is killed at any moment goes on as if it had not been: no sample lost or seen twice, the same weights."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from micro import command, write_images
from recorded import Recorder, Seen, seen
from test_remote import Server

from fcmae.command_line import launch
from fcmae.pretrain import pretrain
from fcmae.training.pretraining import PretrainModule

MICRO = [
    *("+model=custom", "model.depths=[1,1,1,1]", "model.dims=[8,8,16,16]", "model.decoder_dim=16"),
    *("model.drop_path_rate=0.3", "data.image_size=64", "data.batch_size=4", "data.val_images=8"),
    *("optim.warmup_epochs=1", "epochs=3", "save.every_n_steps=3", "pictures=0", "effective_batch=8"),
    "augment.crop_scale=[0.2,1]",
]
ONE = ["trainer=cpu", "data.num_workers=2"]
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.num_workers=2"]
RECORDED = Path(__file__).with_name("recorded.py")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 40)
    return folder


def here(run: Path, *options: str) -> Seen:
    """Trains in this process."""
    record = run.with_suffix(".jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainModule, "training_step", Recorder(record))
        patch.setattr(sys, "argv", ["pretrain", *MICRO, f"run_dir={run}", *options])
        launch.run("pretrain", pretrain)
    return seen(record)


def there(run: Path, *options: str, kill_at: int | None) -> None:
    """Trains in a process of its own, with processes of its own, until it is killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RECORD": str(run.with_suffix(".jsonl"))}
    if kill_at is not None:
        environment["KILL_AT"] = str(kill_at)
    command = [sys.executable, str(RECORDED), *MICRO, f"run_dir={run}", *options]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False, start_new_session=True
    )
    assert done.returncode == (0 if kill_at is None else -signal.SIGKILL), done.stderr


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    optimizer = checkpoint["optimizer_states"][0]["state"]
    moments = {f"{index}.{name}": value for index, entry in optimizer.items() for name, value in entry.items()}
    return {**checkpoint["state_dict"], **moments}


def same_weights(run: Path, reference: Path) -> bool:
    mine, its = weights(run), weights(reference)
    return mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in its)


def epochs(record: Seen, steps: int) -> list[list[str]]:
    """Names of the samples of each epoch, sorted."""
    found: dict[int, list[str]] = {}
    for (step, _), names in record.items():
        found.setdefault(step // steps, []).extend(name.split()[0] for name in names)
    return [sorted(found[epoch]) for epoch in sorted(found)]


def test_a_killed_run_on_a_folder_goes_on_exactly(tmp_path: Path, images: Path) -> None:
    options = [*ONE, "data=folder", f"data.path={images}"]
    reference = here(tmp_path / "reference", *options)
    assert len(reference) == 24  # 3 epochs of 32 images in 4 steps of 2 batches
    kills = random.Random(os.urandom(8)).sample(range(8, 18), 2)
    print("killed at the batches", kills)
    there(tmp_path / "run", *options, kill_at=min(kills))
    record = here(tmp_path / "run", *options)
    assert record == reference
    assert same_weights(tmp_path / "run", tmp_path / "reference")
    every = epochs(record, steps=4)
    assert all(names == every[0] and len(set(names)) == 32 for names in every)
    assert len({tuple(reference[step, 0]) for step in (0, 4, 8)}) == 3  # each epoch has its order


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """Seven shards to learn from, one to validate with, packed from the images by the verb itself."""
    out = tmp_path_factory.mktemp("www") / "shards"
    done = command(
        *("shard", out.parent, "data=folder", f"data.path={images}", f"out={out}", "data.val_images=8"),
        *("shard_size=5", "num_workers=0", "short_side=null", "data.image_size=64"),
    )
    assert done.code == 0, done
    return out


@pytest.mark.slow
def test_a_killed_run_on_shards_goes_on_exactly_from_a_disk_and_from_a_server(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(place: str | Path) -> list[str]:
        paths = [f"data.path={place}/train", f"data.val_path={place}/val"]
        return [*ONE, "data=webdataset", *paths, f"data.cache_dir={tmp_path / 'cache'}", "data.mixed_shards=3"]

    reference = here(tmp_path / "reference", *options(shards))
    every = epochs(reference, steps=4)
    assert all(names == every[0] and len(set(names)) == 32 for names in every)
    assert len({tuple(reference[step, 0]) for step in (0, 4, 8)}) == 3
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server(shards)
    threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    server.faults["train-000003.tar"] = ["503", "cut"]
    for name, place in (("disk", shards), ("server", server.url)):
        kill_at = random.Random(os.urandom(8)).randrange(8, 20)
        print(f"{name}: killed at the batch", kill_at)
        there(tmp_path / name, *options(place), kill_at=kill_at)
        assert here(tmp_path / name, *options(place)) == reference
        assert same_weights(tmp_path / name, tmp_path / "reference")
    assert server.gets["train-000003.tar"] == 3
    assert all(count == 1 for name, count in server.gets.items() if name.endswith(".tar") and "3" not in name)
    server.http.shutdown()


@pytest.mark.slow
def test_two_ranks_go_on_as_one(tmp_path: Path, images: Path) -> None:
    """Two ranks are killed; one goes on with twice the accumulation, and sees what two would have seen."""
    options = ["data=folder", f"data.path={images}"]
    there(tmp_path / "two", *TWO, *options, kill_at=None)
    there(tmp_path / "run", *TWO, *options, kill_at=7)
    record = here(tmp_path / "run", *ONE, *options)
    assert record == seen(tmp_path / "two.jsonl")
    mine, its = weights(tmp_path / "run"), weights(tmp_path / "two")
    for name in its:  # sums in another order, through the 5 or more steps after the kill
        torch.testing.assert_close(mine[name], its[name], rtol=1e-4, atol=1e-6)
    losses = [json.loads((tmp_path / run / "summary.json").read_text())["val_loss"] for run in ("run", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
