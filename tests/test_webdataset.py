"""Shards: samples by their place in them, whatever wrote the tar; what an index says, and what it must not say."""

import io
import json
import logging
import os
import pickle
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from webdataset import TarWriter

from fcmae import UserError
from fcmae.data.loader import open_loader
from fcmae.data.remote import RemoteCache
from fcmae.data.sampler import EpochSampler
from fcmae.data.shard_index import Shard, read_index, write_index
from fcmae.data.tar_shard import TarShard, _plain_members
from fcmae.data.transforms import Crop
from fcmae.data.webdataset import WebDataset, WebDatasetDataModule

OPTIONS: dict[str, Any] = {
    "image_size": 32,
    "in_chans": 3,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.5, 0.25, 0.2],
    "batch_size": 3,
    "val_images": 4,
    "augment": Crop(crop_scale=[0.2, 1.0], flip=True),
    "num_workers": 0,
    "timeout": 60,
    "max_broken": 0.01,
    "repeats": 1,
    "samples_per_epoch": None,
    "seed": 0,
    "fraction": 1.0,
    "shots": None,
    "sampling": "uniform",
    "mixed_shards": 2,
    "val_path": None,
    "cache_gib": 1,
}


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(number)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, numbers: Sequence[int], **members: Any) -> Path:
    """A shard of pictures, and of members whose content follows from the picture's number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for number in numbers:
            others = {name: content(number) for name, content in members.items()}
            tar.write({"__key__": f"{number:06d}", "png": png(number)} | {k: v for k, v in others.items() if v})
    return path


def write_shards(folder: Path, count: int, size: int = 6) -> list[Path]:
    label = lambda number: str(number % 3).encode()  # noqa: E731
    return [write_shard(folder / f"x-{s:03d}.tar", range(s * size, (s + 1) * size), cls=label) for s in range(count)]


def source(path: Any, cache: Path, *, val_path: Any = None, most_open: int = 4) -> WebDataset:
    path = str(path) if isinstance(path, Path) else path
    return WebDataset(
        path=path, val_path=val_path, in_chans=3, cache=RemoteCache(folder=cache, gib=1), most_open=most_open
    )


def data_module(path: Path, **options: Any) -> WebDatasetDataModule:
    return WebDatasetDataModule(path=str(path), cache_dir=str(path.parent / "cache"), **{**OPTIONS, **options})


def index_beside(folder: Path, **changes: Any) -> None:
    """A true index, but for changes to its first shard."""
    shards = []
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as file:
            tar = TarShard(file, name=path.name)
            labels = [tar.label(place) for place in range(len(tar))]
            shards.append(Shard(path.name, len(tar), path.stat().st_size, None, labels))
    shards[0] = shards[0]._replace(**changes)
    (folder / "index.json").write_text(write_index(shards, ["a", "b", "c"]))


# -- samples --


@pytest.mark.parametrize("indexed", [True, False])
def test_samples_are_what_was_packed(indexed, tmp_path):
    write_shards(tmp_path / "in", 3)
    if indexed:
        index_beside(tmp_path / "in")
    pattern = f"{tmp_path}/in/x-{{000..002}}.tar"
    listed = [f"{tmp_path}/in/x-000.tar", f"{tmp_path}/in/x-{{001,002}}.tar"]
    for path in (tmp_path / "in", pattern, listed):
        images = source(path, tmp_path / "cache")
        assert len(images) == 18
        assert images.labels.tolist() == [number % 3 for number in range(18)]
        assert images.class_names == (["a", "b", "c"] if indexed else ["0", "1", "2"])
        assert images.held_out is None
        assert (images.shard_names, images.shard_sizes) == (["x-000.tar", "x-001.tar", "x-002.tar"], [6, 6, 6])
        for index in (17, 0, 6, 5):
            assert np.array_equal(np.asarray(images.open(index).decode()), pixels(index))
            assert images.sample_id(index) == f"x-{index // 6:03d}.tar:{index % 6}"


def test_shards_to_validate_with_come_last(tmp_path):
    write_shards(tmp_path / "train", 2)
    write_shard(tmp_path / "val" / "v.tar", range(100, 105), cls=lambda number: b"2")
    data = data_module(tmp_path / "train", val_path=str(tmp_path / "val"))
    train, held_out = data.split()
    assert (list(train), list(held_out)) == (list(range(12)), list(range(12, 17)))
    assert [name for batch in data.val_dataloader() for name in batch.sample_ids] == [f"v.tar:{n}" for n in range(5)]
    assert data.class_counts().tolist() == [4, 4, 4]


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_fewer_shards_than_workers_neither_hang_nor_repeat(shards, tmp_path):
    write_shards(tmp_path / "in", shards)
    data = data_module(tmp_path / "in")
    indices, _ = data.split()

    def names(rank: int, world_size: int, num_workers: int, accumulate: int) -> list[list[str]]:
        order = EpochSampler(
            size=len(indices),
            batch_size=1,
            accumulate=accumulate,
            rank=rank,
            world_size=world_size,
            order=data.order(indices),
        )
        loader = open_loader(
            data.dataset(indices, train=True), order, batch_size=1, num_workers=num_workers, timeout=60
        )
        return [batch.sample_ids for batch in loader]

    ranks = [names(rank, 2, 2, 1) for rank in range(2)]
    together = [name for pair in zip(*ranks, strict=True) for batch in pair for name in batch]
    assert len(set(together)) == len(together) == len(indices) // 2 * 2
    assert together == [name for batch in names(0, 1, 0, 2) for name in batch]  # one device that accumulates


def test_a_source_goes_to_workers_without_its_files(tmp_path):
    write_shards(tmp_path / "in", 2)
    images = source(tmp_path / "in", tmp_path / "cache")
    images.open(0)
    sent = pickle.loads(pickle.dumps(images))
    assert not sent._open
    assert np.array_equal(np.asarray(sent.open(7).decode()), pixels(7))
    child = os.fork()
    if not child:  # the files were opened before the fork
        same = all(np.array_equal(np.asarray(images.open(n).decode()), pixels(n)) for n in range(12))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_few_files_are_open(tmp_path):
    write_shards(tmp_path / "in", 9, size=1)
    images = source(tmp_path / "in", tmp_path / "cache", most_open=3)
    for index in (*range(9), *range(9)):
        images.open(index)
        assert len(images._open) <= 3
    files = [tar._file for tar in images._open.values()]
    assert not any(file.closed for file in files)


def test_a_broken_picture_is_replaced_and_named(tmp_path):
    write_shard(tmp_path / "in" / "x.tar", range(5))
    with tarfile.open(tmp_path / "in" / "x.tar", "a") as tar:
        for name, content in (("a.jpg", b"no picture"), ("b.json", b"{}"), ("c.pyd", pickle.dumps(print))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    dataset = data_module(tmp_path / "in").dataset(range(8), train=False)
    sample = dataset[0, 5][0]
    assert sample.sample_id == "x.tar:0"
    assert [name for name, _ in sample.broken] == ["x.tar:5", "x.tar:6", "x.tar:7"]
    assert sample.broken[1][1] == "ValueError: no picture among b.json"


def test_equal_file_names_are_told_apart(tmp_path):
    for folder in ("p/one", "p/two"):
        write_shard(tmp_path / folder / "x.tar", range(2))
    images = source(f"{tmp_path}/p/{{one,two}}/x.tar", tmp_path / "cache")
    assert images.shard_names == ["one/x.tar", "two/x.tar"]
    with pytest.raises(UserError, match=r"shard .*one/x.tar is named twice in data.path and data.val_path"):
        source(f"{tmp_path}/p/{{one,two}}/x.tar", tmp_path / "cache", val_path=f"{tmp_path}/p/one")


# -- tars --

names = st.text("aä/字 b_-", min_size=1, max_size=300).map(lambda text: text.strip("/ ") or "a")


@given(
    members=st.lists(st.tuples(names, st.binary(max_size=1500)), min_size=1, max_size=6),
    kind=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@settings(max_examples=60)
def test_every_kind_of_header_is_read(members, kind, tmp_path_factory):
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    written = []
    with tarfile.open(path, "w", format=kind) as tar:
        for number, (name, content) in enumerate(members):
            member = tarfile.TarInfo(f"{number}{name}.png")
            member.size = len(content)
            try:
                tar.addfile(member, io.BytesIO(content))
            except ValueError:  # too long for USTAR
                continue
            written.append((member.name, content))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    with path.open("rb") as file:
        shard = TarShard(file, name="x.tar")
        assert [shard.picture(place) for place in range(len(shard))] == written


@given(cut=st.integers(0, 8 * 1024))
def test_a_tar_that_ends_too_early_is_refused(cut, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tar")
    content = write_shard(folder / "whole" / "x.tar", range(3), cls=lambda number: b"1").read_bytes()
    whole = content.rstrip(b"\0")
    end = -(-len(whole) // 512) * 512  # the end mark begins here
    (folder / "x.tar").write_bytes(content[: min(cut, end)])
    with pytest.raises(UserError, match=rf"shard .*x.tar .*(ends|it ends) at byte {min(cut, end)}, after ") as error:
        source(folder / "x.tar", folder / "cache")
    assert "\n" not in str(error.value)


def test_a_compressed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(UserError, match=r"shard .*x.tar is no whole, uncompressed tar"):
        source(tmp_path / "x.tar", tmp_path / "cache")


@pytest.mark.parametrize("mtime", [0, None])  # None: now, as a fraction, which takes a second header
def test_a_thousand_members_are_found_at_once(mtime, tmp_path):
    with (tmp_path / "x.tar").open("wb") as file, TarWriter(file, encoder=False, mtime=mtime) as tar:
        for number in range(1000):
            tar.write({"__key__": f"{number}", "png": b"x" * 1000})
    with (tmp_path / "x.tar").open("rb") as file:
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            assert len(_plain_members(file)) == 1000
            seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05  # 2 and 5 ms on an idle machine; tarfile takes 20 and 50


# -- indexes and counts --


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 77}, r"shard .*x-000.tar has \d+ bytes, index.json beside it says 77: fetch the shard again, or del"),
        (
            {"samples": 7, "labels": None},
            r"shard .*x-000.tar holds 6 samples, not 7 as its index says: fetch the shard again, or delete the index",
        ),
        ({"samples": 7}, r".*index.json is no index of shards \(ValueError: x-000.tar has 7 samples, and labels"),
        ({"url": "other.tar"}, r".* lacks 1 of the shards that its index.json lists, the first other.tar: fetch them"),
    ],
)
def test_an_index_that_disagrees_is_refused(changes, message, tmp_path):
    write_shards(tmp_path / "in", 2)
    index_beside(tmp_path / "in", **changes)
    with pytest.raises(UserError, match=message) as error:
        source(tmp_path / "in", tmp_path / "cache").open(0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"wids_version": 2}', b'{"wids_version": 1, "shardlist": [{}]}'])
def test_what_is_no_index_is_refused(text):
    with pytest.raises(UserError, match=r"in/index.json is no index of shards \(.*\): delete it, or write it anew"):
        read_index(text, place="in/index.json")


def test_an_index_of_wids_is_understood():
    listed = [
        {"url": "https://host/a/x.tar", "nsamples": 3, "filesize": 5, "md5sum": "0"},
        {"url": "y.tar", "nsamples": 1},
    ]
    index = read_index(json.dumps({"wids_version": 1, "shardlist": listed}).encode(), place="index.json")
    assert index.shards == {"x.tar": Shard("x.tar", 3, 5), "y.tar": Shard("y.tar", 1)}


def test_shards_are_counted_once(tmp_path, monkeypatch, capfd):
    paths = write_shards(tmp_path / "in", 2)
    first = source(tmp_path / "in", tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("fcmae.data.shard_list.TarShard", None)
        again = source(tmp_path / "in", tmp_path / "cache")
    assert (again.shard_sizes, again.labels.tolist()) == (first.shard_sizes, first.labels.tolist())
    write_shard(paths[0], range(4), cls=lambda number: b"2")
    os.utime(paths[0], (0, 0))
    assert source(tmp_path / "in", tmp_path / "cache").shard_sizes == [4, 6]
    assert capfd.readouterr().out == ""


def test_labels_are_all_or_none(tmp_path, caplog):
    write_shard(tmp_path / "in" / "x.tar", range(4), cls=lambda number: b"1" if number != 2 else b"cat")
    with caplog.at_level(logging.WARNING):
        assert source(tmp_path / "in", tmp_path / "cache").labels is None
    assert "the labels are left out: x.tar:2 has no .cls with a number from 0" in caplog.text
    write_shard(tmp_path / "none" / "x.tar", range(4))
    data = data_module(tmp_path / "none")
    assert len(data.split()[0]) == 3
    with pytest.raises(UserError, match="WebDataset: the images have no labels"):
        _ = data.labels


def test_classes_are_named_by_a_file_beside_the_shards(tmp_path):
    write_shards(tmp_path / "in", 1)
    (tmp_path / "in" / "class_names.txt").write_text("cat\ndog\nemu\n")
    assert source(tmp_path / "in", tmp_path / "cache").class_names == ["cat", "dog", "emu"]
    (tmp_path / "in" / "class_names.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"class 2 of a sample has no name, the shards name 2 classes"):
        source(tmp_path / "in", tmp_path / "cache")


# -- what one types --


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "in/x-{000..",
            r"data.path=.*in/x-\{000.. is no pattern \(Unbalanced braces.*\): write it as x-\{000..123\}.tar",
        ),
        ("in/x-{000..009}.tar", r"data.path: .*in/x-002.tar does not exist: name a folder of \*.tar, or shards"),
        ("nowhere", r"data.path: .*nowhere does not exist"),
        ("empty", r"data.path=.*empty names no shard: name a folder of \*.tar, or a pattern as x-\{000..123\}.tar"),
        ("${in}", r"data.path=.* is no pattern \(missing environment variable"),
    ],
)
def test_shards_that_are_not_there(path, message, tmp_path):
    write_shards(tmp_path / "in", 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message) as error:
        source(f"{tmp_path}/{path}", tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_options_out_of_their_bounds(tmp_path):
    with pytest.raises(UserError, match=r"data.cache_gib=0 must be above 0"):
        data_module(tmp_path, cache_gib=0)
    with pytest.raises(UserError, match=r"data.mixed_shards=0 must be at least 1"):
        data_module(tmp_path, mixed_shards=0)


def test_the_fingerprint_changes_with_the_shards(tmp_path):
    write_shards(tmp_path / "in", 2)
    before = data_module(tmp_path / "in").fingerprint()
    assert data_module(tmp_path / "in").fingerprint() == before
    write_shard(tmp_path / "in" / "y.tar", [1], cls=lambda number: b"1")
    assert data_module(tmp_path / "in").fingerprint() != before


def test_training_draws_from_shards(tmp_path):
    write_shards(tmp_path / "in", 4)
    data = data_module(tmp_path / "in", num_workers=2)
    batches = list(data.train_dataloader())
    assert len(batches) == 20 // 3
    assert all(batch.images.dtype == torch.uint8 and batch.labels is not None for batch in batches)
