"""A signal stops a run at any moment: what is done is saved, and the same command goes on as if nothing had been."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from micro import write_images
from test_resume import MICRO, checkpoints, train, weights

from fcmae.data.datamodule import ImageDataModule
from fcmae.data.dataset import ImageDataset
from fcmae.data.folder import FolderDataModule
from fcmae.stopping import STOPPED, StopRequest, Woken, watching
from fcmae.training.journal import Journal
from fcmae.training.pretraining import PretrainModule

OPTIONS = ["data.num_workers=0", "save.every_n_steps=1000", "data.batch_size=4", "trainer.accumulate_grad_batches=2"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 40, (70, 80))
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A run of three epochs of four steps of two batches, which nothing disturbed."""
    run = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv)
        train(run, images, *OPTIONS)
    return run


@pytest.fixture
def disturbed(tmp_path: Path, images: Path, reference: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Trains under a patch until a signal ends that, then without it to the end, and compares with the reference."""
    monkeypatch.setattr(sys, "argv", sys.argv)

    def run(place: Any, name: str, replacement: Any, *options: str, saved: str) -> Path:
        folder = tmp_path / "run"
        with monkeypatch.context() as patch:
            patch.setattr(place, name, replacement)
            with pytest.raises(SystemExit) as stop:
                train(folder, images, *OPTIONS, *options)
        assert stop.value.code == STOPPED
        assert [file.stem for file in checkpoints(folder)] == [saved]
        assert Journal(folder / "journal.jsonl").read()[-1]["event"] == "stopped"
        train(folder, images, *OPTIONS, *options)
        mine, its = weights(folder), weights(reference)
        assert mine.keys() == its.keys()
        assert all(torch.equal(mine[key], its[key]) for key in its)
        return folder

    return run


def signalled(function: Callable[..., Any], *, when: Callable[..., bool], signum: int = signal.SIGTERM) -> Any:
    """The function, which sends this process a signal once."""
    sent: list[bool] = []

    def wrapper(*arguments: Any) -> Any:
        if not sent and when(*arguments):
            sent.append(True)
            os.kill(os.getpid(), signum)
        return function(*arguments)

    return wrapper


@pytest.mark.parametrize("batch", [0, 1])
def test_among_the_batches_of_a_step(disturbed: Callable[..., Path], batch: int) -> None:
    """In the first batch of a step, the step is not done; in its last one, it is."""

    def third_step(module: PretrainModule, _: Any, index: int) -> bool:
        return module.global_step == 5 and index % 2 == batch

    step = signalled(PretrainModule.training_step, when=third_step, signum=signal.SIGUSR1)
    disturbed(PretrainModule, "training_step", step, saved=f"epoch=0002-step={5 + batch:08d}")


def test_in_a_validation(disturbed: Callable[..., Path]) -> None:
    step = signalled(PretrainModule.validation_step, when=lambda module, *_: module.global_step == 8)
    disturbed(PretrainModule, "validation_step", step, saved="epoch=0002-step=00000008")


def test_in_the_last_validation(disturbed: Callable[..., Path]) -> None:
    """Nothing but the validation is left to do."""
    step = signalled(PretrainModule.validation_step, when=lambda module, *_: module.global_step == 12)
    folder = disturbed(PretrainModule, "validation_step", step, saved="epoch=0003-step=00000012")
    assert (folder / "summary.json").is_file()


def test_during_a_save(disturbed: Callable[..., Path]) -> None:
    """The save is finished; it is the one that the run goes on from."""
    save = signalled(torch.save, when=lambda checkpoint, _: checkpoint["global_step"] == 5)
    disturbed(torch, "save", save, "save.every_n_steps=5", saved="epoch=0002-step=00000005")


@pytest.mark.parametrize("workers", [0, 2])
def test_while_data_does_not_come(disturbed: Callable[..., Path], tmp_path: Path, workers: int) -> None:
    """A picture that is never read: the disk or the network hangs."""
    read, begun = ImageDataset.__getitem__, tmp_path / "begun"
    threading.Thread(target=_signal_after, args=(begun,), daemon=True).start()

    def hanging(self: ImageDataset, key: Any) -> Any:
        if self.seed is not None and key[0] == 1 and not self.source.sample_id(self.indices[key[1]]).endswith("0.png"):
            begun.touch()
            time.sleep(600)
        return read(self, key)

    started = time.monotonic()
    disturbed(ImageDataset, "__getitem__", hanging, f"data.num_workers={workers}", saved="epoch=0001-step=00000004")
    assert time.monotonic() - started < 60


def _signal_after(file: Path) -> None:
    while not file.exists():
        time.sleep(0.1)
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def start(run: Path, images: Path, *options: str) -> "subprocess.Popen[str]":
    words = [word for word in MICRO if word != "trainer=cpu" or "trainer=ddp" not in options]
    command = [sys.executable, "-m", "fcmae.pretrain", *words, f"data.path={images}", f"run_dir={run}", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(true: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, to see which signals are caught")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_while_it_is_importing(tmp_path: Path, images: Path, signum: int) -> None:
    process = start(tmp_path / "run", images)

    def caught() -> bool:
        status = Path(f"/proc/{process.pid}/status").read_text()
        mask = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
        return bool(mask >> (signal.SIGUSR1 - 1) & 1)  # which, other than SIGINT, Python does not catch by itself

    wait_for(caught, 20)
    process.send_signal(signum)
    _, err = process.communicate(timeout=20)
    assert process.returncode == (130 if signum == signal.SIGINT else STOPPED), err
    assert err.splitlines()[-1] == (
        f"fcmae: {signal.Signals(signum).name} before the training began; the same command starts it again"
    )
    assert not (tmp_path / "run").exists()


def test_while_the_other_node_is_awaited(tmp_path: Path, images: Path) -> None:
    """The main thread is inside of torch's own code, for half an hour if nobody comes."""
    options = ["trainer=ddp", "trainer.num_nodes=2", "trainer.devices=1", "trainer.accelerator=cpu"]
    log = tmp_path / "run" / "train.log"
    with mock.patch.dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), NODE_RANK="0"):
        process = start(tmp_path / "run", images, *options)
    wait_for(lambda: process.poll() is not None or (log.exists() and "run folder: " in log.read_text()))
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == STOPPED, err
    assert err.splitlines()[-1] == "fcmae: SIGTERM before the training began; the same command starts it again"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_when_every_process_gets_it(tmp_path: Path, images: Path, signum: int) -> None:
    """As from a terminal or from a cluster: those that read images must leave it to the run."""
    journal = Journal(tmp_path / "run" / "journal.jsonl")
    process = start(tmp_path / "run", images, "data.num_workers=2", "epochs=100000", "save.keep=2")
    wait_for(lambda: any(entry["event"] == "saved" for entry in journal.read()))
    os.killpg(process.pid, signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if signum == signal.SIGINT else STOPPED), err
    assert "Traceback" not in err
    assert "killed by signal" not in err
    assert err.splitlines()[-1].startswith("interrupted after ")
    stopped = journal.read()[-1]
    assert (stopped["event"], stopped["signal"]) == ("stopped", signal.Signals(signum).name)
    assert checkpoints(tmp_path / "run")[-1].name.endswith(f"step={stopped['step']:08d}.ckpt")


def test_a_request_is_obeyed_at_once_where_nothing_can_be_lost(capsys: pytest.CaptureFixture[str]) -> None:
    request = StopRequest()
    with pytest.raises(SystemExit) as stop:
        request(signal.SIGUSR1, None)
    assert stop.value.code == STOPPED
    assert "SIGUSR1 before the training began" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        StopRequest()(signal.SIGINT, None)
    assert stop.value.code == 130


def test_a_second_interrupt_is_not_held() -> None:
    request = StopRequest()
    request.hold()
    request(signal.SIGINT, None)
    request(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        request(signal.SIGINT, None)
    assert request.signum == signal.SIGINT


def test_waiting_ends_with_a_request_and_not_without() -> None:
    request = StopRequest()

    def batches() -> Iterator[int]:
        yield 1
        request(signal.SIGTERM, None)
        raise AssertionError("the signal was not heard")

    request.hold()
    iterator = batches()
    assert request.wait_for(iterator) == 1
    with pytest.raises(Woken):
        request.wait_for(iterator)
    with pytest.raises(Woken):  # nor is anything waited for afterwards
        request.wait_for(iter([1]))


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path: Path, images: Path) -> None:
    journal = Journal(tmp_path / "run" / "journal.jsonl")
    script = tmp_path / "slow.py"
    script.write_text(
        "import time\n"
        "from fcmae.stopping import watch\n"
        "watch()\n"
        "from fcmae.command_line import launch\n"
        "from fcmae.pretrain import pretrain\n"
        "from fcmae.training.pretraining import PretrainModule\n"
        "PretrainModule.training_step = lambda self, batch, index: time.sleep(100)\n"
        "launch.run('pretrain', pretrain)\n"
    )
    words = [*MICRO, f"data.path={images}", f"run_dir={tmp_path / 'run'}", "data.num_workers=1"]
    process = subprocess.Popen(
        [sys.executable, script, *words], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: any(entry["event"] == "started" for entry in journal.read()))
    time.sleep(1)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.5)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "fcmae: interrupted twice; the same command goes on from what is saved"


def test_another_run_of_the_same_process_is_not_asked_again() -> None:
    with watching() as request:
        with watching() as first:
            assert first is request
            first.hold()
            first(signal.SIGTERM, None)
        with watching() as second:
            assert second.wait_for(iter([1])) == 1


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with watching() as request, watching() as same:
        assert request is same
        assert signal.getsignal(signal.SIGUSR1) is request
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


class Counting:
    """A gate that counts."""

    def __init__(self) -> None:
        self.asked = 0

    def fetch(self, batches: Iterator[Any]) -> Any:
        batch = next(batches)
        self.agree()
        return batch

    def agree(self) -> None:
        self.asked += 1


@pytest.mark.parametrize(("val_images", "world_size", "batch_size"), [(9, 2, 4), (7, 3, 2), (10, 4, 1), (4, 4, 8)])
def test_ranks_are_asked_equally_often_in_a_validation(
    images: Path, val_images: int, world_size: int, batch_size: int
) -> None:
    """Though some may have fewer batches."""

    class Trainer:
        limit_val_batches, num_devices = 1.0, world_size

    Trainer.world_size = world_size  # type: ignore[attr-defined]
    counts, lengths = [], []
    for rank in range(world_size):
        data = _data(images, batch_size=batch_size, val_images=val_images)
        Trainer.global_rank = rank  # type: ignore[attr-defined]
        data.trainer, gate = Trainer, Counting()  # type: ignore[assignment]
        data.gate = gate
        lengths.append(len(list(data.val_dataloader())))
        counts.append(gate.asked)
    assert len(set(counts)) == 1, (counts, lengths)
    assert counts[0] == max(lengths)


def _data(images: Path, *, batch_size: int, val_images: int) -> ImageDataModule:
    from hydra import compose, initialize_config_dir

    from fcmae.command_line.launch import build, config_folder

    overrides = [f"data.path={images}", f"data.batch_size={batch_size}", f"data.val_images={val_images}"]
    overrides += ["data.num_workers=0", "data.image_size=64", "+model=atto", "data=folder"]
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        data = build(compose("pretrain", overrides=overrides).data)
    assert isinstance(data, FolderDataModule)
    data._loaded = None
    return data
