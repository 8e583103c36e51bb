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
    "read_labels": True,
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
    return WebDatasetDataModule(path=str(path), **{**OPTIONS, "cache_dir": str(path.parent / "cache"), **options})


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
    file = images._open[0]._file
    place = os.lseek(file.fileno(), 0, os.SEEK_CUR)
    child = os.fork()
    if not child:  # the files were opened before the fork
        same = all(np.array_equal(np.asarray(images.open(n).decode()), pixels(n)) for n in range(12))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == place  # which a fork shares


def test_few_files_are_open(tmp_path):
    write_shards(tmp_path / "in", 9, size=1)
    images = source(tmp_path / "in", tmp_path / "cache", most_open=3)
    for index in (*range(9), *range(9)):
        images.open(index)
        assert len(images._open) <= 3
    files = {shard: tar._file for shard, tar in images._open.items()}
    assert list(files) == [6, 7, 8]
    assert not any(file.closed for file in files.values())
    for index in (6, 0):
        images.open(index)
    assert list(images._open) == [8, 6, 0]
    assert {shard for shard, file in files.items() if file.closed} == {7}  # the one not used for longest


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


@pytest.mark.parametrize(
    ("members", "taken"),
    [
        (["0.image.jpg", "0.label.cls"], "0.image.jpg"),
        (["0.Image.PNG", "0.cls"], "0.Image.PNG"),
        (["0.mask.png", "0.png", "0.fine.cls", "0.cls"], "0.png"),
        (["0.embedding.npy", "0.jpg", "0.cls"], "0.jpg"),
        (["0.a.jpg", "0.b.png", "0.a.cls", "0.b.cls"], "0.a.jpg"),
    ],
)
def test_the_last_extension_says_what_a_member_is(members, taken, tmp_path):
    """As in WebDataset's decoders; what has no other extension goes before."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, name in enumerate(members):
            content = str(number).encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with (tmp_path / "x.tar").open("rb") as file:
        shard = TarShard(file, name="x.tar")
        assert shard.picture(0) == (taken, str(members.index(taken)).encode())
        plain = [name for name in members if name.endswith("cls") and name.count(".") == 1]
        classes = plain or [name for name in members if name.endswith("cls")]
        assert shard.label(0) == members.index(classes[0])


def test_an_image_of_two_extensions_is_decoded(tmp_path):
    content = png(3)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        member = tarfile.TarInfo("0.image.png")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    images = source(tmp_path / "x.tar", tmp_path / "cache")
    assert np.array_equal(np.asarray(images.open(0).decode()), pixels(3))


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


def test_labels_mended_in_a_shard_but_not_in_its_index_are_refused(tmp_path):
    paths = write_shards(tmp_path / "in", 2)
    index_beside(tmp_path / "in")
    write_shard(paths[1], range(6, 12), cls=lambda number: b"2" if number == 9 else str(number % 3).encode())
    images = source(tmp_path / "in", tmp_path / "cache")
    images.open(0)
    with pytest.raises(
        UserError, match=r"^sample 3 of shard .*x-001.tar is of class 2, not 0 as it was indexed or counted: write "
    ) as error:
        images.open(6)
    assert "\n" not in str(error.value)
    data = data_module(tmp_path / "in", read_labels=False)
    assert len(list(data.train_dataloader())) == 10 // 3  # labels that are not read may be anything


def test_an_index_may_have_labels_where_a_shard_has_none(tmp_path):
    path = write_shard(tmp_path / "in" / "x.tar", range(3))
    listed = [Shard(path.name, 3, None, None, [0, 1, 1])]
    (tmp_path / "in" / "index.json").write_text(write_index(listed, ["a", "b"]))
    images = source(tmp_path / "in", tmp_path / "cache")
    images.open(0)
    assert images.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize("indexed", [True, False])
def test_local_shards_need_no_folder_of_the_user(indexed, tmp_path, monkeypatch):
    write_shards(tmp_path / "in", 2)
    if indexed:
        index_beside(tmp_path / "in")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # as without a home
    data = data_module(tmp_path / "in", cache_dir=None)
    assert data.sharded.shard_sizes == [6, 6]
    assert len(list(data.train_dataloader())) == 10 // 3


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"wids_version": 2}', b'{"wids_version": 1, "shardlist": [{}]}'])
def test_what_is_no_index_is_refused(text):
    with pytest.raises(UserError, match=r"in/index.json is no index of shards \(.*\): delete it, or write it anew"):
        read_index(text, place="in/index.json")


@pytest.mark.parametrize(
    "entry",
    [
        {"nsamples": -30},
        {"nsamples": 1.5},
        {"nsamples": True},
        {"nsamples": 1, "filesize": -1},
        {"nsamples": 1, "labels": [0.5]},
        {"nsamples": 1, "labels": [1e20]},
        {"nsamples": 1, "labels": [2**31]},
        {"nsamples": 1, "labels": [-1]},
        {"nsamples": 1, "labels": [True]},
        {"nsamples": 1, "labels": "1"},
        {"nsamples": 2, "labels": [0]},
    ],
)
def test_an_index_says_nothing_but_whole_numbers(entry):
    text = json.dumps({"wids_version": 1, "shardlist": [{"url": "x.tar"} | entry]}).encode()
    with pytest.raises(UserError, match=r"index.json is no index of shards \(ValueError: x.tar has .*\): delete it"):
        read_index(text, place="index.json")


def test_an_index_that_cannot_be_read(tmp_path):
    write_shards(tmp_path / "in", 1)
    (tmp_path / "in" / "index.json").mkdir()
    with pytest.raises(UserError, match=r"in/index.json cannot be read \(Is a directory\): mend that, or remove it"):
        source(tmp_path / "in", tmp_path / "cache")


@pytest.mark.parametrize("note", ["[1]", "null", "[[6, null], [6]]", "{"])
def test_a_note_of_what_was_counted_may_be_lost(note, tmp_path):
    write_shards(tmp_path / "in", 2)
    source(tmp_path / "in", tmp_path / "cache")
    (kept,) = (tmp_path / "cache").glob("counts-*.json")
    kept.write_text(note)
    assert source(tmp_path / "in", tmp_path / "cache").shard_sizes == [6, 6]


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


@pytest.mark.parametrize("text", [str(2**31), "9" * 23, "9" * 5000, "-1", "0.5", "\u0663"])
def test_what_is_no_class_is_no_label(text, tmp_path, caplog):
    write_shard(tmp_path / "in" / "x.tar", range(4), cls=lambda number: text.encode() if number == 3 else b"1")
    with caplog.at_level(logging.WARNING):
        assert source(tmp_path / "in", tmp_path / "cache").labels is None
    assert "the labels are left out: x.tar:3 has no .cls with a number from 0 below 2^31" in caplog.text


@pytest.mark.parametrize("largest", [1000, 300_000_000, 2**31 - 1])
def test_a_class_far_above_all_others_is_refused(largest, tmp_path):
    numbered = lambda number: str(largest if number == 3 else 1).encode()  # noqa: E731
    write_shard(tmp_path / "in" / "x.tar", range(6), cls=numbered)
    with pytest.raises(
        UserError, match=rf"class {largest} of sample x.tar:3 is more than .*: mend its .cls, "
    ) as error:
        source(tmp_path / "in", tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert "data.read_labels=false" in str(error.value)
    unlabelled = data_module(tmp_path / "in", read_labels=False)
    assert unlabelled.sharded.labels is None
    assert unlabelled.class_names == []
    assert len(unlabelled.split()[0]) == 5
    assert not any(batch.labels is not None for batch in unlabelled.train_dataloader())


def test_a_thousand_classes_need_no_names(tmp_path):
    write_shard(tmp_path / "in" / "x.tar", range(6), cls=lambda number: b"999")
    assert source(tmp_path / "in", tmp_path / "cache").class_names == [str(number) for number in range(1000)]


def test_labels_that_are_not_read_cannot_be_wrong(tmp_path, caplog):
    write_shards(tmp_path / "in", 2)
    write_shards(tmp_path / "val", 1)
    (tmp_path / "in" / "class_names.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    (tmp_path / "val" / "class_names.txt").write_text("x\ny\n")
    with pytest.raises(
        UserError, match=r"in/class_names.txt is no text in UTF-8 \(invalid .* at byte 3\): save it so$"
    ):
        source(tmp_path / "in", tmp_path / "cache")
    data = data_module(tmp_path / "in", val_path=str(tmp_path / "val"), read_labels=False)
    with pytest.raises(UserError, match="WebDataset: the images have no labels"):
        _ = data.labels
    assert not caplog.records


def test_both_parts_have_the_same_classes(tmp_path):
    for folder, names in (("in", "cat\ndog\nemu\n"), ("val", "\ufeffcat\nemu\ndog\n"), ("anon", "")):
        write_shards(tmp_path / folder, 1)
        (tmp_path / folder / "class_names.txt").write_text(names, encoding="utf-8")
    with pytest.raises(UserError, match=r"data.val_path names other classes than data.path: pack both with the same"):
        source(tmp_path / "in", tmp_path / "cache", val_path=str(tmp_path / "val"))
    for path, val_path in (("in", "anon"), ("anon", "in")):
        images = source(tmp_path / path, tmp_path / "cache", val_path=str(tmp_path / val_path))
        assert images.class_names == ["cat", "dog", "emu"]
    images = source(tmp_path / "val", tmp_path / "cache")
    assert images.class_names == ["cat", "emu", "dog"]  # without the mark at the start of the file


def test_indexes_that_name_different_classes(tmp_path):
    for folder, names in (("one", "ab"), ("two", "ba")):
        write_shard(tmp_path / folder / f"{folder}.tar", range(2), cls=lambda number: b"1")
        listed = [Shard(f"{folder}.tar", 2, None, None, [1, 1])]
        (tmp_path / folder / "index.json").write_text(write_index(listed, list(names)))
    with pytest.raises(UserError, match=r"data.path=.* the indexes beside the shards name different classes"):
        source(f"{tmp_path}/{{one,two}}", tmp_path / "cache")


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


def test_other_channels_are_told_at_once(tmp_path):
    tiff = io.BytesIO()
    Image.new("CMYK", (8, 8)).save(tiff, "TIFF")
    content = {"png": b"broken", "jpg": tiff.getvalue()}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for key, (extension, data) in enumerate([*content.items()] * 3):
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    options = {"mean": [0.5] * 5, "std": [0.5] * 5, "in_chans": 5}
    with pytest.raises(UserError, match=r"x.tar:1 has 4 channels \(CMYK\), not data.in_chans=5: set data.in_chans, "):
        data_module(tmp_path / "x.tar", **options).split()
    options = {"mean": [0.5] * 4, "std": [0.5] * 4, "in_chans": 4}
    assert len(data_module(tmp_path / "x.tar", **options).split()[0]) == 5


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
