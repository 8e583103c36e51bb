"""The README's commands and snippets are read from it and run, shortened by options at their end."""

import re
import runpy
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fcmae.__main__ import VERBS

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line.startswith("python -m fcmae.")
]
PYTHON = [block for language, block in BLOCKS if language == "python"]
SHORTER = {
    "fcmae.pretrain": [
        "epochs=1",
        "data.batch_size=4",
        "data.val_images=4",
        "data.num_workers=0",
        "trainer.limit_train_batches=1",
        "optim.warmup_epochs=0",
    ],
    "fcmae.bench": ["model.image_size=64", "batch_size=1", "repeats=1", "warmup=0", "precision=32"],
    "fcmae.shard": ["num_workers=0"],
    "fcmae.finetune": ["epochs=1", "data.batch_size=4", "data.num_workers=0", "optim.warmup_epochs=0"],
    "fcmae.evaluate": ["num_workers=0", "device=cpu"],
    "fcmae.predict": ["num_workers=0", "device=cpu"],
    "fcmae.embed": ["num_workers=0", "device=cpu"],
    "fcmae.export": [],
}
ALONE = [command for command in COMMANDS if command[2] in ("fcmae.pretrain", "fcmae.shard", "fcmae.bench")]
AFTER = [command for command in COMMANDS if command not in ALONE]  # each uses what those before it have made


def run(command: list[str], folder: Path) -> None:
    _, _, module, *arguments = command
    arguments = [argument.replace("DIR", str(folder)).replace("LABELLED", str(folder)) for argument in arguments]
    arguments += SHORTER[module]
    if "experiment=fcmae" in arguments:
        arguments += ["effective_batch=4", "data.image_size=96"]
    sys.argv = [module, *arguments]
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:  # which a process of its own would keep to its end
        signal.set_wakeup_fd(-1)
        for signum, handler in before.items():
            signal.signal(signum, handler)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(generator.integers(0, 256, (120, 100, 3), dtype=np.uint8)).save(folder / f"{index}.jpg")
    return folder


def test_it_begins_with_the_two_commands() -> None:
    language, block = BLOCKS[0]
    assert language == "bash"
    assert [line.split("#")[0].strip() for line in block.splitlines()] == ["make demo", "make test"]


def test_there_are_commands_to_run() -> None:
    assert len(COMMANDS) >= 5
    elsewhere = {"consolidate"}  # docs/sharding.md
    assert {command[2].removeprefix("fcmae.") for command in COMMANDS} == VERBS.keys() - elsewhere


@pytest.mark.parametrize("command", ALONE, ids=" ".join)
def test_a_command(command: list[str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)
    run(command, photos)
    if command[2] == "fcmae.pretrain":
        assert len(list(tmp_path.glob("outputs/pretrain/*/checkpoints/last.ckpt"))) == 1


def test_the_commands_after_pre_training(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            shutil.copytree(photos, tmp_path / f"labelled/{part}/{name}")
    run(["python", "-m", "fcmae.pretrain", "+model=tiny", "data=folder", f"data.path={photos}"], photos)
    for command in AFTER:
        run(command, tmp_path / "labelled")
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 1 + 24
    assert np.load(tmp_path / "features.npy").shape == (24, 768)
    assert (tmp_path / "outputs/evaluate/finetune-tiny-imagefolder/confusion.png").is_file()
    assert (tmp_path / "outputs/evaluate/pretrain-tiny-folder-knn/metrics.json").is_file()
    shutil.copy(photos / "0.jpg", "image.jpg")
    (snippet,) = (block for block in PYTHON if "pipeline" in block)
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert {entry["label"] for entry in names["classifier"]("image.jpg")} == {"cat", "dog"}


def test_the_snippets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)
    run(["python", "-m", "fcmae.pretrain", "+model=tiny"], tmp_path)
    snippets = [block for block in PYTHON if "pipeline" not in block]
    assert len(snippets) == 3
    names: dict[str, Any] = {"images": torch.randn(2, 3, 96, 96)}
    exec(snippets[0], names)
    assert names["features"].shape == (2, 768, 3, 3)
    assert not names["model"].training
    exec(snippets[1], names)
    trained = names["model"].encoder.net.state_dict()
    loaded = names["net"].state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in trained.items())
    assert names["net"](names["images"]).shape == (2, 10)
    exec(snippets[2], names)
    assert names["pred"].shape == (2, 4, 32 * 32 * 5)


def test_the_tables_name_tests_that_exist() -> None:
    tests = Path(__file__).parent
    for file, name in re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::(\w+))?`", README):
        assert (tests / file).is_file(), file
        assert f"def {name}" in (tests / file).read_text(), name
    for line in README.splitlines():
        if "`::" in line:  # a second test of the file named before it
            file = re.findall(r"(test_\w+\.py)", line)[0]
            for name in re.findall(r"`::(\w+)`", line):
                assert f"def {name}" in (tests / file).read_text(), name


def test_links_lead_somewhere() -> None:
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (root / target).exists(), target
