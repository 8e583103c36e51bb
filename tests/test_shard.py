"""Packing: shards hold what the source gave, byte for byte the same however often and by how many they are written."""

import errno
import gc
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from filelock import FileLock
from micro import Result, command, write_images
from PIL import Image
from test_webdataset import OPTIONS

from fcmae.command_line.launch import config_folder
from fcmae.data.folder import Folder
from fcmae.data.imagefolder import ImageFolder
from fcmae.data.picture import Decoded, Picture, to_tensor
from fcmae.data.remote import RemoteCache
from fcmae.data.shard_writer import _Hashed, encode, plan
from fcmae.data.webdataset import WebDataset, WebDatasetDataModule

FEW = ["shard_size=4", "num_workers=0", "data.val_images=5"]


def shard(folder: Path, *arguments: str, out: str = "out") -> Result:
    return command("shard", folder, "data=folder", "data.path=in", f"out={out}", *FEW, *arguments)


def shards(folder: Path) -> dict[str, str]:
    """What is in every tar and index below a folder."""
    files = sorted([*folder.rglob("*.tar"), *folder.rglob("index.json")])
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def source(folder: Path, in_chans: int = 3) -> WebDataset:
    kept = RemoteCache(folder=folder / "cache", gib=1)
    train, val = str(folder / "train"), str(folder / "val")
    return WebDataset(path=train, val_path=val, in_chans=in_chans, cache=kept, most_open=4)


def original_ids(folder: Path) -> list[str]:
    """The samples' first names, in the order of the shards."""
    found = []
    for path in [*sorted(folder.glob("train/*.tar")), *sorted(folder.glob("val/*.tar"))]:
        with tarfile.open(path) as tar:
            found += [json.load(tar.extractfile(member))["id"] for member in tar if member.name.endswith(".json")]
    return found


def classes(folder: Path) -> None:
    for number, name in enumerate("abc"):
        write_images(folder / name, 7 + number)


def test_shards_hold_the_same_pictures_and_labels(tmp_path):
    classes(tmp_path / "in")
    result = command("shard", tmp_path, "data=imagefolder", "data.path=in", "out=out", *FEW, "short_side=32")
    assert result.code == 0, result
    lines = result.err.splitlines()
    assert "images: 24, in 6 shards in out" in lines
    assert lines[-1] == (
        "to train on them: python -m fcmae.pretrain +model=tiny data=webdataset "
        "data.path=out/train data.val_path=out/val"
    )
    packed, files = source(tmp_path / "out"), ImageFolder(path=tmp_path / "in", in_chans=3)
    assert packed.shard_sizes == [4] * 6
    assert packed.held_out == range(20, 24)
    assert packed.class_names == ["a", "b", "c"]
    ids = original_ids(tmp_path / "out")
    number_of = {files.sample_id(index): index for index in range(len(files))}
    assert sorted(ids) == sorted(number_of)
    assert ids != sorted(ids)  # consecutive samples are of different classes
    for index, sample_id in enumerate(ids):
        number = number_of[sample_id]
        assert packed.labels[index] == files.labels[number]
        buffer = io.BytesIO()
        image = files.open(number).decode()
        image.resize((38, 32), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        assert np.array_equal(np.asarray(packed.open(index).decode()), np.asarray(Image.open(buffer)))
    entries = json.loads((tmp_path / "out/train/index.json").read_text())["shardlist"]
    for entry in entries:
        content = (tmp_path / "out/train" / entry["url"]).read_bytes()
        assert (entry["filesize"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_the_data_module_takes_what_was_packed(tmp_path):
    classes(tmp_path / "in")
    assert command("shard", tmp_path, "data=imagefolder", "data.path=in", "out=out", *FEW).code == 0
    out = tmp_path / "out"
    options = {**OPTIONS, "path": str(out / "train"), "val_path": str(out / "val"), "cache_dir": str(tmp_path / "c")}
    data = WebDatasetDataModule(**options)
    assert [len(part) for part in data.split()] == [20, 4]
    assert sum(data.class_counts().tolist()) == 20
    assert not (tmp_path / "c").exists()  # an index needs no cache
    keys = set(yaml.safe_load((config_folder() / "data/webdataset.yaml").read_text())) - {"_target_"}
    assert keys == set(options)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_bytes_whatever_the_workers(workers, tmp_path):
    write_images(tmp_path / "in", 23)
    assert shard(tmp_path).code == 0
    assert shard(tmp_path, f"num_workers={workers}", out="other").code == 0
    assert shards(tmp_path / "out") == shards(tmp_path / "other")
    assert shard(tmp_path, "seed=1", out="third").code == 0
    assert shards(tmp_path / "out") != shards(tmp_path / "third")


def test_a_packing_that_was_killed_goes_on(tmp_path):
    write_images(tmp_path / "in", 40, size=(300, 300))
    child = multiprocessing.get_context("fork").Process(target=shard, args=(tmp_path,))
    child.start()
    record, end = tmp_path / "out/packing.jsonl", time.monotonic() + 60
    while not record.is_file() or len(record.read_text().splitlines()) < 3:
        assert time.monotonic() < end
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    done = shards(tmp_path / "out")
    assert 2 <= len(done) < 10  # of 9 shards to learn from and 2 others
    (tmp_path / "out/train/.train-000005.tar.123.tmp").write_bytes(b"half")
    with record.open("a") as file:
        file.write('{"file": "train/tr')
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in list(done)[:2]}
    assert shard(tmp_path).code == 0
    assert times == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in times}
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert shard(tmp_path, out="other").code == 0
    assert shards(tmp_path / "out") == shards(tmp_path / "other")
    again = shard(tmp_path)
    assert again.code == 0
    assert "images: 40, in 11 shards in out" in again.err.splitlines()


def test_a_shard_that_was_lost_is_written_again(tmp_path):
    write_images(tmp_path / "in", 20)
    assert shard(tmp_path).code == 0
    before = shards(tmp_path / "out")
    (tmp_path / "out/train/train-000001.tar").unlink()
    (tmp_path / "out/train/train-000002.tar").write_bytes(b"half")
    assert shard(tmp_path).code == 0
    assert shards(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("quality=80", "out=out was begun with quality=90, not 80: name another folder, or delete this one"),
        ("short_side=null", "out=out was begun with short_side=256, not None: name another folder, or delete this one"),
        ("shard_size=5", "out=out was begun with shard_size=4, not 5: name another folder, or delete this one"),
        ("data.in_chans=1", "out=out was begun with data.in_chans=3, not 1: name another folder, or delete this one"),
        ("data.val_images=3", "out=out was begun with images=16 to learn from and 4 held out ("),
    ],
)
def test_other_parameters_are_refused(change, message, tmp_path):
    write_images(tmp_path / "in", 20)
    assert shard(tmp_path).code == 0
    before = shards(tmp_path / "out")
    assert shard(tmp_path, change).only_error.startswith(message)
    assert shards(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("out", "reason"), [("afile", "File exists"), ("afile/sub", "Not a directory"), ("x" * 300, "File name too long")]
)
def test_no_folder_can_be_made_there(out, reason, tmp_path):
    write_images(tmp_path / "in", 3)
    (tmp_path / "afile").write_text("mine")
    message = f"out: no folder can be made at {out} ({reason}): name another one"
    assert shard(tmp_path, out=out).only_error == message
    assert (tmp_path / "afile").read_text() == "mine"


def test_a_file_in_the_place_of_a_part(tmp_path):
    write_images(tmp_path / "in", 3)
    assert shard(tmp_path).code == 0
    shutil.rmtree(tmp_path / "out/val")
    (tmp_path / "out/val").write_text("mine")
    message = "out: no folder can be made at out/val (File exists): name another one"
    assert shard(tmp_path).only_error == message


@pytest.mark.parametrize("record", [b"garbage", b"[1]\n", b"3\n", b"\xff\n", b'{"quality": 90', b"\n{}"])
def test_what_is_no_record_is_refused(record, tmp_path):
    write_images(tmp_path / "in", 3)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/packing.jsonl").write_bytes(record)
    message = "out/packing.jsonl is no record of a packing: name another out, or delete out"
    assert shard(tmp_path).only_error == message
    assert (tmp_path / "out/packing.jsonl").read_bytes() == record


def test_lines_of_a_record_that_say_nothing_are_left_out(tmp_path):
    write_images(tmp_path / "in", 20)
    assert shard(tmp_path).code == 0
    before = shards(tmp_path / "out")
    with (tmp_path / "out/packing.jsonl").open("a") as file:
        file.write('[1]\n3\n{}\n{"file": 3, "shard": []}\n{"file": "x", "shard": {"colour": 1}}\n')
    assert shard(tmp_path).code == 0
    assert shards(tmp_path / "out") == before


def test_a_process_that_is_killed_is_told_in_one_line(tmp_path, monkeypatch):
    write_images(tmp_path / "in", 20)
    real = Folder.open

    def killed(self: Folder, index: int) -> Picture:
        if self.sample_id(index) == "007.png" and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, index)

    parent = os.getpid()
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "open", killed)
        line = shard(tmp_path, "num_workers=2").error
    assert line.startswith("a process that packs died while it read 007.png: the machine may be out of memory (type")
    gc.collect()  # ends the other process
    assert shard(tmp_path, "num_workers=2").code == 0
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert shard(tmp_path, out="other").code == 0
    assert shards(tmp_path / "out") == shards(tmp_path / "other")


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch):
    write_images(tmp_path / "in", 20)
    later: list[str] = []
    real = _Hashed.write

    def full(self: _Hashed, content: bytes) -> int:
        if self.size > 20_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(_Hashed, "write", full)
        patch.setattr(sys, "unraisablehook", lambda told: later.append(str(told.exc_value)))
        line = shard(tmp_path, "shard_size=50").error
        gc.collect()
    assert line.startswith("cannot write out/train/train-000000.tar: No space left on device; free space or mend")
    assert not later
    assert not list((tmp_path / "out").rglob("*.t*p"))


@pytest.mark.parametrize("typed", [[], ["data.mean=auto", "data.std=auto"], ["data.mean=[1,2]"]])
def test_packing_needs_no_normalisation(typed, tmp_path):
    write_images(tmp_path / "in", 5)
    result = shard(tmp_path, *typed)
    assert result.code == 0, result
    (line,) = [line for line in result.err.splitlines() if line.startswith("to train on them: ")]
    assert line.endswith(" data.val_path=out/val" + (" data.mean=auto data.std=auto" if typed else ""))


def test_pictures_that_are_not_natural_are_measured_in_training(tmp_path):
    few = ["data.classes=2", "data.images_per_class=3", "data.image_size=32", "num_workers=0", "data.in_chans=1"]
    result = command("shard", tmp_path, "data=fractal", "out=out", *few)
    assert result.code == 0, result
    assert result.err.splitlines()[-1].endswith(" data.val_path=out/val data.in_chans=1 data.mean=auto data.std=auto")


def test_a_folder_in_use_is_left_alone(tmp_path):
    write_images(tmp_path / "in", 10)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    message = "out=out is not empty, and holds no packing to go on with: name another folder"
    assert shard(tmp_path).only_error == message
    with FileLock(tmp_path / "busy.lock"):
        (tmp_path / "busy").mkdir()
        with FileLock(tmp_path / "busy" / ".lock"):
            message = "out=busy is being filled by another process: wait for it, or name another"
            assert shard(tmp_path, out="busy").only_error == message


def test_broken_pictures_are_left_out_and_listed(tmp_path):
    files = write_images(tmp_path / "in", 30)
    files[3].write_bytes(b"no picture")
    result = shard(tmp_path)
    assert result.code == 0
    assert "images that could not be read: 1, in out/skipped.jsonl" in result.err.splitlines()
    (line,) = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "003.png"
    assert len(original_ids(tmp_path / "out")) == len(source(tmp_path / "out")) == 29

    for file in files[4:9]:
        file.write_bytes(b"no picture")
    stopped = shard(tmp_path, "data.max_broken=0.1", out="other")
    assert "images cannot be read, more than data.max_broken allows: see other/skipped.jsonl" in stopped.error
    assert "more than data.max_broken allows" in shard(tmp_path, "data.max_broken=0.1", out="other").error
    assert shard(tmp_path, "data.max_broken=0.3", out="other").code == 0


def test_what_a_jpeg_would_lose_is_kept_exactly(tmp_path):
    numbers = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for number in range(10):
        np.save(tmp_path / "in" / f"{number}.npy", numbers.normal(size=(5, 400, 300)).astype(np.float32))
    result = shard(tmp_path, "data.in_chans=5")  # nothing is normalised, so no numbers are asked for
    assert result.code == 0, result
    assert result.err.splitlines()[-1].endswith(" data.in_chans=5 data.mean=auto data.std=auto")
    packed, files = source(tmp_path / "out", in_chans=5), Folder(path=tmp_path / "in", in_chans=5)
    for index, name in enumerate(original_ids(tmp_path / "out")):
        assert bool((packed.open(index).decode() == files.open(int(name[0])).decode()).all())


@pytest.mark.parametrize("side", [None, 16, 500])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pictures_are_shrunk_never_enlarged(side, mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).convert(mode)
    name, content = encode(Decoded(image), 95, side)
    assert name == "jpg"
    assert Image.open(io.BytesIO(content)).size == ((24, 16) if side == 16 else (60, 40))
    assert Image.open(io.BytesIO(content)).mode == mode
    assert encode(Decoded(to_tensor(image)), 95, side) == (name, content)


def test_a_plan_has_every_image_once():
    jobs = plan("train", range(100, 123), shard_size=5, seed=0)
    assert [job.file for job in jobs] == [f"train/train-{number:06d}.tar" for number in range(5)]
    assert [job.first for job in jobs] == [0, 5, 10, 15, 20]
    order = [index for job in jobs for index in job.indices]
    assert sorted(order) == list(range(100, 123))
    assert order != sorted(order)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quality=0"], "quality=0 must be a whole number from 1 to 100"),
        (["shard_size=0"], "shard_size=0 must be a whole number from 1"),
        (["short_side=big"], "short_side='big' must be a whole number from 1"),
        (["data.in_chans=0"], "data.in_chans=0 must be a whole number from 1"),
        (["num_workers=-1"], "num_workers=-1 must be a whole number from 0"),
        (["out=3"], "out=3 must be text: a folder"),
        (["data.path=nowhere"], "nowhere does not exist: name a folder of images"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, message, tmp_path):
    write_images(tmp_path / "in", 3)
    assert shard(tmp_path, *arguments).only_error == message
    assert not (tmp_path / "out").exists()


def test_several_classes_per_image_do_not_fit(tmp_path):
    write_images(tmp_path / "in", 10)
    table = ["image,label", *(f"{number:03d}.png,{'x;y' if number % 2 else 'x'}" for number in range(10))]
    (tmp_path / "labels.csv").write_text("\n".join(table))
    options = ["data=table", "data.path=in", "data.table=labels.csv", "data.multi_label=true", "out=out"]
    message = "a shard's .cls holds one class, these images have several: pack them as data=folder, without"
    assert command("shard", tmp_path, *options).only_error == message


def test_shards_are_packed_anew_from_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    classes(tmp_path / "in")
    assert command("shard", tmp_path, "data=imagefolder", "data.path=in", "out=out", *FEW).code == 0
    shutil.rmtree(tmp_path / "in")
    few = ["data=webdataset", "data.path=out/train", "data.val_path=out/val", "shard_size=50", "num_workers=0"]
    assert command("shard", tmp_path, "out=anew", *few).code == 0
    before, anew = source(tmp_path / "out"), source(tmp_path / "anew")
    assert anew.shard_sizes == [20, 4]
    names = {before.sample_id(index): index for index in range(len(before))}
    for index, name in enumerate(original_ids(tmp_path / "anew")):
        assert anew.labels[index] == before.labels[names[name]]
