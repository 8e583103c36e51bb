"""A run that stops anywhere goes on as if it had not: the same batches, the same weights, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fcmae
from fcmae.command_line import launch
from fcmae.pretrain import pretrain
from fcmae.training.pretraining import PretrainModule
from fcmae.training.run_folder import RunFolder

MICRO = [
    "+model=custom",
    "model.depths=[1,1,1,1]",
    "model.dims=[8,8,16,16]",
    "model.decoder_dim=16",
    "model.drop_path_rate=0.3",
    "data=folder",
    "data.image_size=64",
    "data.batch_size=8",
    "data.val_images=8",
    "optim.warmup_epochs=1",
    "epochs=3",
    "trainer=cpu",
    "save.every_n_steps=1",
    "save.keep=1000",
    "pictures=1",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(generator.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Records (sample ids, loss) of every training step."""
    recorded: list[Any] = []
    training_step = PretrainModule.training_step

    def recording(self: PretrainModule, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = training_step(self, batch, batch_idx)
        recorded.append((batch.sample_ids, loss.item()))
        return loss

    monkeypatch.setattr(PretrainModule, "training_step", recording)
    return recorded


def train(run: Path, images: Path, *options: str) -> None:
    sys.argv = ["pretrain", *MICRO, f"data.path={images}", f"run_dir={run}", *options]
    launch.run("pretrain", pretrain)


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return {**checkpoint["state_dict"], **flat_optimizer(checkpoint["optimizer_states"][0])}


def flat_optimizer(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {f"{index}.{name}": value for index, entry in state["state"].items() for name, value in entry.items()}


def summary(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return content


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("epoch=*.ckpt"))


def stopped_after(reference: Path, copy: Path, step: int) -> None:
    """Copies a finished run to what it was after `step` steps."""
    shutil.copytree(reference, copy)
    (copy / "summary.json").unlink()
    (copy / "checkpoints" / "last.ckpt").unlink()
    for file in checkpoints(copy)[step:]:
        file.unlink()


@pytest.mark.parametrize(("accumulate", "workers"), [(1, 0), (2, 2)])
def test_resuming_after_any_step_changes_nothing(
    tmp_path: Path, images: Path, steps: list[Any], monkeypatch: pytest.MonkeyPatch, accumulate: int, workers: int
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    options = [f"trainer.accumulate_grad_batches={accumulate}", f"data.num_workers={workers}"]
    train(tmp_path / "reference", images, *options)
    reference, all_steps = weights(tmp_path / "reference"), list(steps)
    total = len(checkpoints(tmp_path / "reference"))
    assert total == 12 // accumulate  # 32 training images, 3 epochs
    for step in range(1, total + 1):
        steps.clear()
        run = tmp_path / f"stopped_after_{step}"
        stopped_after(tmp_path / "reference", run, step)
        train(run, images, *options)
        assert steps == all_steps[step * accumulate :]
        resumed = weights(run)
        assert resumed.keys() == reference.keys()
        assert all(torch.equal(resumed[name], reference[name]) for name in reference)
        assert summary(run)["val_loss"] == summary(tmp_path / "reference")["val_loss"]


@pytest.mark.parametrize("how", ["crash", "signal"])
@pytest.mark.parametrize("together", [1, 2, 3, 4, 5])
def test_a_run_that_is_stopped_again_and_again(
    tmp_path: Path, images: Path, steps: list[Any], monkeypatch: pytest.MonkeyPatch, together: int, how: str
) -> None:
    """A start makes a few steps, of four in an epoch, and is stopped: what is counted must not add up wrongly."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    options = ["data.num_workers=0", f"save.every_n_steps={1 if how == 'crash' else 1000}"]
    train(tmp_path / "reference", images, *options)
    all_steps = list(steps)
    steps.clear()
    recording, first = PretrainModule.training_step, 0

    def stopping(self: PretrainModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if how == "crash" and self.global_step == first + together:
            raise RuntimeError("the machine fails")
        if how == "signal" and self.global_step == first + together - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return recording(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainModule, "training_step", stopping)
        while first + together < len(all_steps):
            with pytest.raises(RuntimeError if how == "crash" else SystemExit):
                train(tmp_path / "run", images, *options)
            first += together
    train(tmp_path / "run", images, *options)
    assert steps == all_steps
    reference = weights(tmp_path / "reference")
    assert all(torch.equal(value, reference[name]) for name, value in weights(tmp_path / "run").items())
    assert summary(tmp_path / "run") == summary(tmp_path / "reference")


def test_every_step_is_logged_once(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    options = ["trainer.log_every_n_steps=1", "data.num_workers=0"]
    train(tmp_path / "reference", images, *options)
    stopped_after(tmp_path / "reference", tmp_path / "run", step=5)
    train(tmp_path / "run", images, *options)

    def logged(run: Path) -> list[Any]:
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["train_loss"]) for line in lines if "train_loss" in line]

    assert logged(tmp_path / "run") == logged(tmp_path / "reference")
    assert [step for step, _ in logged(tmp_path / "run")] == list(range(1, 13))


def test_another_seed_draws_other_batches(tmp_path: Path, images: Path, steps: list[Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    train(tmp_path / "a", images, "data.num_workers=0", "epochs=1")
    train(tmp_path / "b", images, "data.num_workers=0", "epochs=1", "seed=1")
    assert steps[:4] != steps[4:]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_signal_saves_and_the_same_command_goes_on(
    tmp_path: Path, images: Path, steps: list[Any], monkeypatch: pytest.MonkeyPatch, signum: int, code: int
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    options = ["data.num_workers=0", "save.every_n_steps=1000"]
    train(tmp_path / "reference", images, *options)
    all_steps = list(steps)
    steps.clear()
    recording = PretrainModule.training_step

    def interrupting(self: PretrainModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == 5:
            os.kill(os.getpid(), signum)
        return recording(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainModule, "training_step", interrupting)
        with pytest.raises(SystemExit) as stop:
            train(tmp_path / "run", images, *options)
    assert stop.value.code == code
    assert [file.name for file in checkpoints(tmp_path / "run")] == ["epoch=0002-step=00000006.ckpt"]
    assert "interrupted after 6 steps" in (tmp_path / "run" / "train.log").read_text()
    train(tmp_path / "run", images, *options)
    assert steps == all_steps
    reference = weights(tmp_path / "reference")
    assert all(torch.equal(value, reference[name]) for name, value in weights(tmp_path / "run").items())


def test_a_run_that_the_trainer_ends_early_is_saved_and_not_called_finished(
    tmp_path: Path, images: Path, steps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    train(tmp_path / "reference", images, "data.num_workers=0")
    all_steps = list(steps)
    steps.clear()
    recording = PretrainModule.training_step

    def stopping(self: PretrainModule, batch: Any, batch_idx: int) -> torch.Tensor:
        self.trainer.should_stop = self.global_step == 2  # as trainer.max_time does
        return recording(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainModule, "training_step", stopping)
        train(tmp_path / "run", images, "data.num_workers=0", "save.every_n_steps=1000")
    assert [file.name for file in checkpoints(tmp_path / "run")] == ["epoch=0001-step=00000003.ckpt"]
    assert not (tmp_path / "run" / "summary.json").exists()
    train(tmp_path / "run", images, "data.num_workers=0", "save.every_n_steps=1000")
    assert steps == all_steps


def test_max_steps_amid_an_epoch_is_the_runs_end(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    train(tmp_path / "run", images, "data.num_workers=0", "trainer.max_steps=3", "pictures=1")
    assert (tmp_path / "run" / "summary.json").exists()
    assert "epoch 1: validation loss" in (tmp_path / "run" / "train.log").read_text()
    assert [file.name for file in (tmp_path / "run" / "images").glob("epoch=*")] == ["epoch=0001-step=00000003.png"]


@pytest.mark.parametrize("change", ["more images", "another batch"])
def test_a_run_goes_on_with_its_own_images_and_batch_only(
    tmp_path: Path, images: Path, change: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    copy = shutil.copytree(images, tmp_path / "images")
    train(tmp_path / "reference", copy, "data.num_workers=0")
    stopped_after(tmp_path / "reference", tmp_path / "run", step=5)
    if change == "more images":
        shutil.copy(copy / "00.png", copy / "more.png")
    else:  # what another number of devices does, which the configuration does not show
        monkeypatch.setattr("fcmae.training.session.set_accumulation", lambda trainer, **batch: 4)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run", copy, "data.num_workers=0")
    assert stop.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "was trained with" in told
    assert ("40 images" in told and "41 images" in told) or "effective_batch 8, now it is 4" in told


def test_two_processes_cannot_train_in_one_folder(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    with RunFolder(tmp_path / "run").lock(), pytest.raises(SystemExit) as stop:
        train(tmp_path / "run", images, "data.num_workers=0")
    assert stop.value.code == 2
    assert "another process trains in" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_stop_and_go_on(tmp_path: Path, images: Path) -> None:
    """DDP on the CPU in processes of its own; stopped by the checkpoints that are taken away."""
    options = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.num_workers=0"]

    def train_in_processes(run: Path) -> None:
        command = [sys.executable, "-m", "fcmae.pretrain", *MICRO, f"data.path={images}", f"run_dir={run}", *options]
        subprocess.run([item for item in command if item != "trainer=cpu"], check=True, timeout=300)

    train_in_processes(tmp_path / "reference")
    assert len(checkpoints(tmp_path / "reference")) == 6
    stopped_after(tmp_path / "reference", tmp_path / "run", step=3)
    train_in_processes(tmp_path / "run")
    reference = weights(tmp_path / "reference")
    assert all(torch.equal(value, reference[name]) for name, value in weights(tmp_path / "run").items())
    assert summary(tmp_path / "run") == summary(tmp_path / "reference")


def test_a_kill_during_a_write_leaves_a_loadable_checkpoint(tmp_path: Path, images: Path) -> None:
    """In a process of its own, which kills itself when half of the third checkpoint is on the disk."""
    script = tmp_path / "killed.py"
    script.write_text(
        """
import os, signal, sys, torch
from fcmae.command_line import launch
from fcmae.pretrain import pretrain

save, saves = torch.save, []

def killed_in_the_third(checkpoint, file):
    saves.append(file)
    save(checkpoint, file)
    if len(saves) == 3:
        file.truncate(file.tell() // 2)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = killed_in_the_third
launch.run("pretrain", pretrain)
"""
    )
    options = [*MICRO, f"data.path={images}", f"run_dir={tmp_path / 'run'}", "data.num_workers=0"]
    killed = subprocess.run([sys.executable, script, *options], capture_output=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = sorted(file.name for file in (tmp_path / "run" / "checkpoints").iterdir())
    assert left[0].startswith(".epoch=0001-step=00000003.ckpt")  # the half-written one
    assert left[1:] == ["epoch=0001-step=00000001.ckpt", "epoch=0001-step=00000002.ckpt", "last.ckpt"]
    assert not fcmae.load(tmp_path / "run").training
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2


def test_a_truncated_checkpoint_is_passed_over(
    tmp_path: Path, images: Path, steps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    train(tmp_path / "reference", images, "data.num_workers=0")
    all_steps = list(steps)
    steps.clear()
    stopped_after(tmp_path / "reference", tmp_path / "run", step=6)
    newest = checkpoints(tmp_path / "run")[-1]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    train(tmp_path / "run", images, "data.num_workers=0")
    assert steps == all_steps[5:]
    warned = [line for line in (tmp_path / "run" / "train.log").read_text().splitlines() if "WARNING" in line]
    assert len(warned) == 1
    assert f"{newest} cannot be read" in warned[0]


@pytest.fixture(scope="module")
def reference(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of twelve steps."""
    run = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv)
        train(run, images, "data.num_workers=0")
    return run


def truncated(file: Path) -> Path:
    os.truncate(file, file.stat().st_size // 2)
    return file


def test_a_run_does_not_begin_again_where_no_checkpoint_can_be_read(
    tmp_path: Path, images: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    run = tmp_path / "run"
    stopped_after(reference, run, step=6)
    for file in checkpoints(run)[:4]:
        file.unlink()
    older, newest = map(truncated, checkpoints(run))
    (run / "checkpoints" / "last.ckpt").hardlink_to(newest)
    log = (run / "train.log").read_bytes()
    with pytest.raises(SystemExit) as stop:
        train(run, images, "data.num_workers=0")
    assert stop.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(
        f"fcmae: {run} holds no checkpoint that can be read: {newest} cannot be read, it is truncated"
    )
    assert told.endswith(
        f"nor can {older.name} and last.ckpt; copy one back, or start over with resume=never, which sets the run aside"
    )
    assert checkpoints(run) == [older, newest]
    assert (run / "train.log").read_bytes() == log
    train(run, images, "data.num_workers=0", "resume=never")
    assert (tmp_path / "run.old1" / "checkpoints" / newest.name).is_file()
    assert summary(run) == summary(reference)


@pytest.mark.parametrize("older", ["an older one", "none"])
def test_a_run_does_not_begin_again_where_the_disk_does_not_answer(
    tmp_path: Path, images: Path, reference: Path, older: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Nor from an older checkpoint; reading this file gives EIO."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    run = tmp_path / "run"
    stopped_after(reference, run, step=2 if older != "none" else 1)
    newest = checkpoints(run)[-1]
    newest.unlink()
    newest.symlink_to("/proc/self/mem")
    log = (run / "train.log").read_bytes()
    with pytest.raises(SystemExit) as stop:
        train(run, images, "data.num_workers=0")
    assert stop.value.code == 1  # a job tries it again
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"fcmae: cannot read {newest}: Input/output error; see whether its disk or server is well")
    assert (run / "train.log").read_bytes() == log


def test_last_is_gone_on_from_where_no_other_can_be_read(
    tmp_path: Path, images: Path, reference: Path, steps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    run = tmp_path / "run"
    stopped_after(reference, run, step=11)
    for file in checkpoints(run)[:-1]:
        file.unlink()
    (newest,) = checkpoints(run)
    shutil.copy(newest, run / "checkpoints" / "last.ckpt")
    truncated(newest)
    train(run, images, "data.num_workers=0")
    assert len(steps) == 1
    assert f"{newest} cannot be read" in (run / "train.log").read_text()


@pytest.mark.parametrize("links", ["hard", "symbolic"])
def test_a_damaged_checkpoint_of_a_later_step_does_not_take_the_place_of_a_new_one(
    tmp_path: Path, images: Path, reference: Path, steps: list[Any], links: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    if links == "symbolic":

        def no_links(*_: Any) -> None:
            raise OSError("not supported")

        monkeypatch.setattr(Path, "hardlink_to", no_links)
    run = tmp_path / "run"
    stopped_after(reference, run, step=8)
    for number, file in enumerate(checkpoints(run), start=1):
        if number not in (3, 8):
            file.unlink()
    truncated(checkpoints(run)[-1])
    options, recording = ["data.num_workers=0", "save.keep=1"], PretrainModule.training_step

    def stopping(self: PretrainModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == 5:
            raise RuntimeError("the machine fails")
        return recording(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainModule, "training_step", stopping)
        with pytest.raises(RuntimeError, match="the machine fails"):
            train(run, images, *options)
    assert [int(file.stem[-8:]) for file in checkpoints(run)] == [5, 8]
    last = run / "checkpoints" / "last.ckpt"
    assert last.is_symlink() == (links == "symbolic")
    assert torch.load(last, weights_only=True)["global_step"] == 5
    train(run, images, *options)
    assert len(steps) == 9, "from the third step to the twelfth"
    assert [int(file.stem[-8:]) for file in checkpoints(run)] == [12]
    wanted = weights(reference)
    assert all(torch.equal(value, wanted[name]) for name, value in weights(run).items())
