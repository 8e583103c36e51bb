"""Images with labels: which class each has, which of them training gets, and what becomes of broken ones."""

import json
import math
import os
import re
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from micro import MICRO, pretrain, write_images
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from fcmae import UserError
from fcmae.data.datamodule import ImageDataModule
from fcmae.data.digits import DigitsDataModule
from fcmae.data.folder import FolderDataModule
from fcmae.data.image_lists import read_list
from fcmae.data.imagefolder import ImageFolder, ImageFolderDataModule
from fcmae.data.labelled import LabelledDataModule
from fcmae.data.picture import Decoded
from fcmae.data.sampler import EpochSampler
from fcmae.data.source import LEFT_OUT, Sample, collate
from fcmae.data.table import Table, TableDataModule
from fcmae.data.transforms import Crop

OPTIONS: dict[str, Any] = {
    "image_size": 32,
    "in_chans": 3,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "batch_size": 4,
    "val_images": 8,
    "augment": Crop(crop_scale=[0.2, 1.0], flip=True),
    "fraction": 1.0,
    "shots": None,
    "sampling": "uniform",
    "num_workers": 0,
    "max_broken": 1.0,
    "timeout": 600,
    "repeats": 1,
    "samples_per_epoch": None,
    "seed": 0,
}


def write(root: Path, *names: str) -> None:
    """Pictures of one brightness each, which counts up from 10 in steps of 10."""
    for number, name in enumerate(names, start=1):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (6, 5), 10 * number).save(root / name)


def folders(root: Path, **options: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(path=str(root), **{**OPTIONS, **options})


def labels_by_name(source: ImageFolder | Table) -> dict[str, Any]:
    """Every image's class, or its classes, by name."""
    named = {}
    for index in range(len(source)):
        label = source.labels[index]
        names = [source.class_names[int(label)]] if label.ndim == 0 else np.array(source.class_names)[label.numpy()]
        named[source.sample_id(index)] = ";".join(names)
    return named


@dataclass
class Listed:
    """Pictures in memory; picture i has the brightness i."""

    labels: Tensor
    held_out: list[int] | None

    def __post_init__(self) -> None:
        classes = int(self.labels.max()) + 1 if self.labels.ndim == 1 else self.labels.shape[1]
        self.class_names = [f"class {index}" for index in range(classes)]

    def __len__(self) -> int:
        return len(self.labels)

    def sample_id(self, index: int) -> str:
        return str(index)

    def open(self, index: int) -> Decoded:
        return Decoded(Image.new("RGB", (4, 4), (index, index, index)))


@dataclass(kw_only=True, eq=False)
class ListedData(LabelledDataModule):
    listed: Listed

    def load_source(self) -> Listed:
        return self.listed


def listed(labels: Any, held_out: list[int] | None = None, **options: Any) -> ListedData:
    return ListedData(listed=Listed(torch.as_tensor(labels), held_out), **{**OPTIONS, **options})


# -- a folder per class --


def test_the_folders_are_the_classes(tmp_path):
    write(tmp_path, "dog/2.png", "cat/1.png", "cat/deep/er/3.png", "ant/4.png", "stray.png", ".trash/5.png")
    source = ImageFolder(path=tmp_path, in_chans=1)
    assert source.class_names == ["ant", "cat", "dog"]
    assert labels_by_name(source) == {
        "ant/4.png": "ant",
        "cat/1.png": "cat",
        "cat/deep/er/3.png": "cat",
        "dog/2.png": "dog",
    }
    assert source.labels.dtype == torch.int64
    assert source.held_out is None
    brightness = {name: 10 * number for number, name in enumerate(("dog/2.png", "cat/1.png", "cat/deep/er/3.png"), 1)}
    for index in range(1, len(source)):  # the names were sorted out before the images are loaded by them
        assert source.open(index).decode().getpixel((0, 0)) == brightness[source.sample_id(index)]


def test_images_beside_the_classes_are_left_out_and_counted(tmp_path, caplog):
    write(tmp_path, "a/1.png", "b/2.png", "s.png", "t.png")
    assert len(ImageFolder(path=tmp_path, in_chans=3)) == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"images in no class's folder, left out: 2, the first {tmp_path / 's.png'}"
    ]


def test_train_and_val_are_told_apart(tmp_path):
    write(tmp_path, "train/b/1.png", "train/a/deep/2.png", "val/a/3.png", "val/b/4.png", "val/b/5.png", "train/a/6.png")
    write(tmp_path, "test/c/7.png", "train/stray.png", "val/stray.png", "stray.png", "val/.x/8.png")
    (tmp_path / "train" / ".hidden").mkdir()
    source = ImageFolder(path=tmp_path, in_chans=3)
    assert source.class_names == ["a", "b"]
    assert labels_by_name(source) == {
        "train/a/6.png": "a",
        "train/a/deep/2.png": "a",
        "train/b/1.png": "b",
        "val/a/3.png": "a",
        "val/b/4.png": "b",
        "val/b/5.png": "b",
    }
    train, held_out = folders(tmp_path, val_images=1).split()  # all of val, whatever val_images
    assert [source.sample_id(index) for index in train] == ["train/a/6.png", "train/a/deep/2.png", "train/b/1.png"]
    assert [source.sample_id(index) for index in held_out] == ["val/a/3.png", "val/b/4.png", "val/b/5.png"]


def test_train_without_val_holds_some_of_it_out(tmp_path):
    write(tmp_path, *[f"train/{name}/{number}.png" for name in "ab" for number in range(20)], "elsewhere/c/1.png")
    data = folders(tmp_path)
    assert data.class_names == ["a", "b"]
    train, held_out = data.split()
    assert (len(train), len(held_out)) == (32, 8)
    assert sorted(train + held_out) == list(range(40))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["val/a/1.png", "val/b/2.png"],
            "data.path=ROOT holds val but no train: name the folder that holds both, or ROOT/val",
        ),
        (["a/1.png", "stray.png"], "ROOT holds 1 folders of classes, at least 2 are needed: put the images of each .*"),
        (["1.png", "2.png"], "ROOT holds 0 folders of classes, at least 2 are needed: .*"),
        (["train/a/1.png", "val/a/2.png", "b/1.png"], "ROOT/train holds 1 folders of classes, .*"),
        (["a/1.png", "b/2.gif"], "ROOT/b holds no image: add some, or remove the folder"),
        (["train/a/1.png", "train/b/.2.png", "val/a/1.png"], "ROOT/train/b holds no image: .*"),
        (
            ["train/a/1.png", "train/b/2.png", "val/c/3.png"],
            "class 'c' of ROOT/val has no folder in ROOT/train: the classes are a, b",
        ),
        (
            [*[f"train/{number:02d}/1.png" for number in range(13)], "val/c/3.png"],
            "class 'c' of .*: the classes are 00, 01, 02, 03, 04, 05, 06, 07, 08, 09 and 3 more",
        ),
    ],
)
def test_image_folders_are_refused(names, message, tmp_path):
    write(tmp_path, *names)
    with pytest.raises(UserError) as caught:
        ImageFolder(path=tmp_path, in_chans=3)
    found = str(caught.value).replace(str(tmp_path), "ROOT")
    assert re.fullmatch(message, found), found


@pytest.mark.parametrize("other", ["valid", "validation", "test"])
def test_a_part_of_another_name_is_told(other, tmp_path, caplog):
    write(tmp_path, *[f"train/{name}/{number}.png" for name in "ab" for number in range(3)], f"{other}/a/3.png")
    assert len(ImageFolder(path=tmp_path, in_chans=3)) == 6
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path} holds train and {other}, but no val: a part of train is held out to validate with; "
        f"if {other} is for that, rename it to val, or link it (ln -s {other} val)"
    )


def test_a_test_folder_without_classes_is_left_alone(tmp_path, caplog):
    write(tmp_path, *[f"train/{name}/{number}.png" for name in "ab" for number in range(3)], "test/1.png", "test/2.png")
    assert len(ImageFolder(path=tmp_path, in_chans=3)) == 6
    assert not caplog.records


def test_parts_may_be_links_into_a_folder_beside_them(tmp_path):
    """As where ImageNet lies in ILSVRC/Data/CLS-LOC."""
    write(tmp_path, *[f"ILSVRC/{part}/{name}/1.png" for part in ("learn", "judge") for name in "ab"], "all/c/1.png")
    (tmp_path / "train").symlink_to("ILSVRC/learn")
    (tmp_path / "val").symlink_to("ILSVRC/judge")
    for part in ("learn", "judge"):
        (tmp_path / "ILSVRC" / part / "c").symlink_to(tmp_path / "all" / "c")
    source = ImageFolder(path=tmp_path, in_chans=3)
    assert labels_by_name(source) == {f"{part}/{name}/1.png": name for part in ("train", "val") for name in "abc"}


def test_what_lies_beside_the_parts_is_not_even_listed(tmp_path, monkeypatch):
    """It may be unreadable, as lost+found is, or large."""
    write(tmp_path, *[f"{part}/{name}/1.png" for part in ("train", "val") for name in "ab"], "lost+found/1.png")
    listed = os.walk

    def walk(top, **options):
        assert Path(top).name in ("train", "val")
        return listed(top, **options)

    monkeypatch.setattr(os, "walk", walk)
    assert len(ImageFolder(path=tmp_path, in_chans=3)) == 4


@pytest.mark.parametrize("classes", [40, 120])
def test_no_class_loses_all_its_images_to_validation(classes, tmp_path):
    write(tmp_path, *[f"{name:03d}/{number}.png" for name in range(classes) for number in range(2)])
    data = folders(tmp_path, val_images=512)
    assert data.class_counts().tolist().count(0) == 0
    train, held_out = data.split()
    assert sorted([*train, *held_out]) == list(range(2 * classes))
    assert classes * 2 // 5 * 0.6 < len(held_out) <= classes * 2 // 5
    assert isinstance(train, array)  # which worker processes share
    assert isinstance(held_out, array)
    plain = set(ImageDataModule.hold_out(data, 2 * classes, classes * 2 // 5)[1])
    assert set(held_out) < plain  # some are given back, none is taken instead


def test_no_class_of_several_loses_all_its_images_to_validation(tmp_path):
    write(tmp_path, *[f"{number}.png" for number in range(25)])
    rows = [f"{number}.png,{'often;' if number % 2 else ''}rare{number // 2}" for number in range(25)]
    (tmp_path / "labels.csv").write_text("image,label\n" + "\n".join(rows))
    data = TableDataModule(path=str(tmp_path), table=str(tmp_path / "labels.csv"), multi_label=True, **OPTIONS)
    train, held_out = data.split()
    assert sorted([*train, *held_out]) == list(range(25))
    assert 0 < len(held_out) < 5
    counts = data.labels[train].sum(0)
    assert [name for name, count in zip(data.class_names, counts, strict=True) if not count] in ([], ["rare12"])


def test_something_stays_held_out_although_every_class_has_one_image(tmp_path):
    write(tmp_path, *[f"{name}/1.png" for name in range(10)])
    data = folders(tmp_path)
    assert len(data.split()[1]) == 1
    with pytest.raises(UserError, match=r"class '.' has no image to learn from"):
        data.class_counts()


def test_a_class_that_has_images_only_to_validate_with_is_refused(tmp_path):
    write(tmp_path, "train/a/1.png", "val/b/2.png")
    (tmp_path / "train" / "b").mkdir()
    with pytest.raises(UserError, match=r"class '.' has no image to learn from"):
        folders(tmp_path).class_counts()


# -- a table --


def table(root: Path, content: str | bytes, *, multi_label: bool = False) -> Table:
    """The table with this content; the pictures a.png, b.png and c.png exist."""
    if not (root / "a.png").exists():
        write(root, "a.png", "b.png", "c.png")
    file = root / "labels.csv"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return Table(path=root, table=file, multi_label=multi_label, in_chans=1)


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "BOM"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_table_gives_each_image_its_class(start, newline, tmp_path):
    source = table(tmp_path, start + newline.join(["image,label", "c.png,zebra", " a.png , ant ", "b.png,zebra", ""]))
    assert source.class_names == ["ant", "zebra"]
    assert [source.sample_id(index) for index in range(3)] == ["c.png", "a.png", "b.png"]  # in the table's order
    assert source.labels.tolist() == [1, 0, 1]
    assert source.labels.dtype == torch.int64
    assert source.held_out is None
    assert [source.open(index).decode().getpixel((0, 0)) for index in range(3)] == [30, 10, 20]


def test_a_table_may_give_an_image_any_number_of_classes(tmp_path):
    text = "label,image,notes\nx; y;,a.png,\n,b.png,none of them\nz;x;x,c.png,twice x\n"
    source = table(tmp_path, text, multi_label=True)
    assert source.class_names == ["x", "y", "z"]
    assert source.labels.dtype == torch.bool
    assert source.labels.tolist() == [[True, True, False], [False, False, False], [True, False, True]]


@pytest.mark.parametrize("columns", ["path,label,notes", "notes,label,image", "path,label,image"])
def test_a_tables_paths_stand_where_those_of_a_list_do(columns, tmp_path):
    source = table(tmp_path, columns + "\na.png,x,b.png\nb.png,y,a.png\n")
    found = [source.sample_id(index) for index in range(2)]
    assert found == read_list(tmp_path / "labels.csv")
    assert found == (["b.png", "a.png"] if "image" in columns else ["a.png", "b.png"])


@pytest.mark.parametrize("names", ["1.0,2.0", "1,1.5", "01,1", "1.0.0,1.0", "1_0,10", "x.0,x", "1e0,1"])
def test_classes_that_are_no_two_spellings_of_a_whole_number_stay(names, tmp_path):
    first, second = names.split(",")
    assert table(tmp_path, f"image,label\na.png,{first}\nb.png,{second}\n").class_names == sorted([first, second])


def test_a_tables_cells_may_hold_commas_quotation_marks_and_foreign_letters(tmp_path):
    names = ["a,1.png", 'b "2".png', "größe/ö.png"]
    write(tmp_path, *names)
    source = table(tmp_path, 'image,label\n"a,1.png","big, red"\n"b ""2"".png",say "hi"\ngröße/ö.png,Öl\n')
    assert labels_by_name(source) == {"a,1.png": "big, red", 'b "2".png': 'say "hi"', "größe/ö.png": "Öl"}
    assert [source.open(index).decode().getpixel((0, 0)) for index in range(3)] == [10, 20, 30]


def test_a_tables_split_is_kept(tmp_path):
    write(tmp_path, *[f"{number}.png" for number in range(6)])
    splits = ["val", "train", "", "  ", " val ", "train"]
    lines = [f"{number}.png,{'xy'[number % 2]},{split}" for number, split in enumerate(splits)]
    source = table(tmp_path, "\n".join(["image,label,split", *lines]))
    assert source.held_out == [0, 4]
    file = str(tmp_path / "labels.csv")
    data = TableDataModule(path=str(tmp_path), table=file, multi_label=False, **OPTIONS)
    assert [list(part) for part in data.split()] == [[1, 2, 3, 5], [0, 4]]


def test_empty_lines_and_empty_last_cells_are_no_mistakes(tmp_path):
    assert len(table(tmp_path, "image,label\n\na.png,x,\n\n\nb.png,y,,\n\n")) == 2


BAD_TABLES = {
    b"": "TABLE has no column 'image' or 'path', only none: name it in line 1",
    b"image;label\na.png;x\n": "TABLE has no column 'image' or 'path', only image;label: name it in line 1",
    b"image,class\na.png,x\n": "TABLE has no column 'label', only image, class: name it in line 1",
    b"a.png,x\nb.png,y\n": "TABLE has no column 'image' or 'path', only a.png, x: name it in line 1",
    b"image,label\n": "TABLE lists no image: add a line for each",
    b"image,label\na.png,x\nb.png,\n": "TABLE, line 3: an image and a label are needed, found 'b.png' and ''",
    b"image,label\na.png,x\n\n,y\n": "TABLE, line 4: an image and a label are needed, found '' and 'y'",
    b"image,label\na.png,x\nb.png\n": "TABLE, line 3: an image and a label are needed, found 'b.png' and ''",
    b"image,label\na.png,x;y\n": "TABLE, line 2: 'x;y' are several labels; add data.multi_label=true, or leave one",
    b"image,label\na,b.png,x\n": "TABLE, line 2: there are more cells than columns: put quotation marks around .*comma",
    b'image,label\n"a.png,x\nb.png,y\n': "TABLE, after line 1: unexpected end of data: mend the quotation marks",
    b'image,label\na.png,x\n"b.png,x\n"c.png,y\n': "TABLE, after line 2: .* expected after .*: mend .* marks",
    b"image,label,split\na.png,x,train\nb.png,y,test\n": "TABLE, line 3: split 'test' is unknown: use train or val",
    b"image,label\na.png,x\nb.png,y\na.png,y\n": "TABLE, line 4: a.png stands there a second time: remove the line",
    b"image,label\na.png,x\nb.png,x\n": "TABLE names 1 classes, at least 2 are needed",
    b"image,label\nd.png,x\ne.png,y\n": "ROOT/d.png of TABLE does not exist: name its folder in data.path",
    b"image,label\na.png,\xe4\nb.png,y\n": r"data.table=TABLE cannot be read \(.*\): name a CSV file in UTF-8",
    b"image,label\n,x;y\n": "TABLE, line 2: .*",
    b"image,label\na.png,1\nb.png,2\nc.png,1.0\n": "TABLE, line 4: class '1.0' is '1' in line 2: write both in one way",
    b"path,label\na.png,-3.00\nb.png,-3\n": "TABLE, line 3: class '-3' is '-3.00' in line 2: write both in one way",
}


@pytest.mark.parametrize("content", BAD_TABLES)
def test_tables_are_refused(content, tmp_path):
    with pytest.raises(UserError) as caught:
        table(tmp_path, content)
    found = str(caught.value).replace(str(tmp_path / "labels.csv"), "TABLE").replace(str(tmp_path), "ROOT")
    assert re.fullmatch(BAD_TABLES[content], found), found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,label\n,x;y\n", "line 2: an image and a label are needed"),
        ("image,label\na.png,;\nb.png,\n", "names 0 classes, at least 2"),
        ("image,label\na.png,x;x\nb.png,\n", "names 1 classes, at least 2"),
        ("image,label\na.png,x;2.0\nb.png,\nc.png,1;2\n", "line 4: class '2' is '2.0' in line 2: write both in"),
    ],
)
def test_tables_of_several_labels_are_refused(content, message, tmp_path):
    with pytest.raises(UserError, match=message):
        table(tmp_path, content, multi_label=True)


def test_a_table_that_is_not_there_is_named(tmp_path):
    write(tmp_path, "a.png")
    for path in (tmp_path / "no.csv", tmp_path):
        with pytest.raises(UserError, match=rf"data.table={re.escape(str(path))} cannot be read .*: name a CSV file"):
            Table(path=tmp_path, table=path, multi_label=False, in_chans=3)


def test_single_files_that_are_missing_are_left_to_the_reader(tmp_path):
    """A table of millions is not checked file by file; a missing one is a broken image."""
    source = table(tmp_path, "image,label\na.png,x\nmissing.png,y\n")
    assert len(source) == 2
    with pytest.raises(FileNotFoundError):
        source.open(1).decode()


def test_digits_labels_are_scikit_learns():
    data = DigitsDataModule(**OPTIONS)
    wanted = load_digits().target
    assert data.labelled.labels.tolist() == wanted.tolist()
    assert data.class_names == [str(digit) for digit in range(10)]
    train, held_out = data.split()
    assert sorted(train + held_out) == list(range(1797))
    assert data.train_labels().tolist() == wanted[train].tolist()
    assert data.class_counts().tolist() == np.bincount(wanted[train]).tolist()


# -- few labels --

class_sizes = st.lists(st.integers(2, 30), min_size=2, max_size=5)


def some_labels(sizes: list[int]) -> tuple[list[int], list[int]]:
    """Labels in no order, so many of each class, and one image of each class that is held out."""
    labels = [label for label, size in enumerate(sizes) for _ in range(size + 1)]
    labels = [labels[index] for index in torch.randperm(len(labels)).tolist()]
    return labels, [labels.index(label) for label in range(len(sizes))]


@given(sizes=class_sizes, seed=st.integers(0, 5), data=st.data())
def test_shots_are_so_many_of_each_class_and_grow(sizes, seed, data):
    shots = data.draw(st.integers(1, min(sizes)))
    labels, held_out = some_labels(sizes)
    few = listed(labels, held_out, shots=shots, seed=seed)
    assert Counter(labels[index] for index in few.split()[0]) == dict.fromkeys(range(len(sizes)), shots)
    assert few.class_counts().tolist() == [shots] * len(sizes)
    assert few.split()[1] == held_out  # validation stays whole, whatever training gets
    assert not set(few.split()[0]) & set(held_out)
    assert few.split() == listed(labels, held_out, shots=shots, seed=seed).split()
    if shots < min(sizes):
        more = listed(labels, held_out, shots=shots + 1, seed=seed)
        assert set(few.split()[0]) < set(more.split()[0])


@given(sizes=class_sizes, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 5))
def test_a_fraction_is_taken_from_each_class(sizes, fraction, seed):
    labels, held_out = some_labels(sizes)
    few = listed(labels, held_out, fraction=fraction, seed=seed)
    for count, size in zip(few.class_counts().tolist(), sizes, strict=True):
        assert count == 1 if fraction * size < 0.5 else abs(count - fraction * size) <= 0.5
    assert not set(few.split()[0]) & set(held_out)
    chosen = few.split()[0]
    assert chosen == sorted(set(chosen))
    assert few.train_labels().tolist() == [labels[index] for index in chosen]


def test_a_fraction_of_one_is_all():
    labels, held_out = some_labels([3, 5])
    train, _ = listed(labels, held_out).split()
    assert sorted([*train, *held_out]) == list(range(10))


def test_the_seed_draws_the_few_images_evenly_and_each_class_by_itself():
    draws = [listed([0] * 5 + [1] * 5, [4, 9], shots=1, seed=seed).split()[0] for seed in range(300)]
    for label in (0, 1):
        counts = Counter(draw[label] - 5 * label for draw in draws)
        # Binomial(300, 1/4), deviation 7.5: five of them are missed once in two million
        assert all(abs(counts[position] - 75) < 37.5 for position in range(4)), counts
    together = sum(draw[0] == draw[1] - 5 for draw in draws)
    assert abs(together - 75) < 37.5  # the second class does not repeat what the first one drew


def test_few_images_of_several_labels_hold_enough_of_each():
    torch.manual_seed(3)
    labels = torch.rand(60, 3) < 0.3
    data = listed(labels, list(range(10)), shots=4)
    train, held_out = data.split()
    assert held_out == list(range(10))
    assert min(train) >= 10
    assert int(data.class_counts().min()) >= 4
    assert len(train) <= 3 * 4  # no image that no class asked for
    assert bool(data.train_labels().any(1).all())
    assert torch.equal(data.class_counts(), labels[train].sum(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, r"data.fraction=0.0 must be a share in \(0, 1\]"),
        ({"fraction": 1.1}, r"data.fraction=1.1 must be a share"),
        ({"fraction": math.nan}, r"data.fraction=nan must be a share"),
        ({"shots": 0}, "data.shots=0, data.fraction=1.0: give a whole number from 1, or a share .*, not both"),
        ({"shots": 2, "fraction": 0.5}, "data.shots=2, data.fraction=0.5: give .*, not both"),
        (
            {"shots": 3},
            "class 'class 1' has 2 images to learn from, not data.shots=3 images: add some, .* or ask for fewer",
        ),
    ],
)
def test_few_labels_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        listed([0, 0, 0, 0, 1, 1, 1], [0, 4], **options).split()


def test_a_class_without_an_image_to_learn_from_is_refused():
    with pytest.raises(UserError, match="class 'class 1' has no image to learn from: add some, or leave"):
        listed([0, 0, 1, 2], [1, 2]).class_counts()
    with pytest.raises(UserError, match="class 'class 0' has no image to learn from"):
        listed([[False, True], [True, True]], [1]).class_counts()


def test_pre_training_does_without_some_classes():
    """As on a part of a large set, whose index names all classes."""
    assert [len(part) for part in listed([0, 0, 2, 2], [1]).split()] == [3, 1]


# -- balanced sampling --

SIZES = [1900, 80, 20]


def order(data: ListedData, epoch: int, **options: Any) -> list[int]:
    """Positions among the training images, as the sampler draws them."""
    sampler = EpochSampler(size=len(data.split()[0]), weights=data.weights(), **{"batch_size": 4, **options})
    sampler.set_epoch(epoch)
    return [position for _, position, *_ in sampler]


def test_balanced_sampling_gives_every_class_the_same_chance_and_every_image_of_it():
    labels, held_out = some_labels(SIZES)
    data = listed(labels, held_out, sampling="balanced")
    drawn = [position for epoch in range(5) for position in order(data, epoch)]
    assert len(drawn) == 5 * sum(SIZES)
    # Hoeffding: a share of n draws is further than this from its mean once in a million
    bound = math.sqrt(math.log(2e6) / (2 * len(drawn)))
    assert bound < 0.03
    shares = torch.bincount(data.train_labels()[drawn], minlength=3) / len(drawn)
    assert (shares - 1 / 3).abs().max() < bound
    smallest = torch.bincount(torch.tensor(drawn), minlength=sum(SIZES))[data.train_labels() == 2] / len(drawn)
    assert len(smallest) == 20
    assert (smallest - 1 / 60).abs().max() < bound / 2  # the deviation is 0.0013


def test_balanced_sampling_follows_from_seed_and_epoch():
    labels, held_out = some_labels([40, 8])
    data = listed(labels, held_out, sampling="balanced")
    orders = [order(data, epoch, seed=seed) for epoch, seed in ((1, 0), (1, 0), (2, 0), (1, 1))]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != orders[3]
    assert orders[0] != sorted(orders[0])  # no batch of neighbours
    assert set(orders[0]) <= set(range(48))


def test_ranks_of_balanced_sampling_share_one_order():
    labels, held_out = some_labels([40, 8])
    data = listed(labels, held_out, sampling="balanced")
    alone = order(data, 1, accumulate=2)
    ranks = [order(data, 1, rank=rank, world_size=2) for rank in range(2)]
    parts = [rank[start : start + 4] for start in range(0, len(alone) // 2, 4) for rank in ranks]
    assert [position for part in parts for position in part] == alone
    assert len(alone) == 48


@pytest.mark.parametrize("steps_done", [0, 1, 5, 12, 17])
def test_balanced_sampling_goes_on_at_its_place(steps_done):
    labels, held_out = some_labels([40, 8])
    data = listed(labels, held_out, sampling="balanced")
    epoch, step = divmod(steps_done, 12)
    assert order(data, epoch, steps_done=steps_done) == order(data, epoch)[4 * step :]


def test_an_image_that_is_drawn_again_is_cropped_anew():
    """Two images of a class against 14 of the other: each of the two comes about four times in 16."""
    data = listed([0] * 14 + [1] * 2, [], sampling="balanced")
    dataset = data.dataset(data.split()[0], train=True)
    dataset.transform = lambda image: torch.rand(1, 2, 2)
    sampler = EpochSampler(size=16, batch_size=4, weights=data.weights())
    keys = list(sampler)
    assert len({key[1] for key in keys}) < 14
    drawn = [tuple(dataset[key][0].image.flatten().tolist()) for key in keys]
    assert len(set(drawn)) == 16
    assert [tuple(dataset[key][0].image.flatten().tolist()) for key in keys] == drawn


def test_the_sampling_reaches_the_loader():
    data = listed([0] * 90 + [1] * 10, list(range(5)), sampling="balanced")
    labels = torch.cat([batch.labels for batch in data.train_dataloader()])
    assert len(labels) == 92  # 95 images in whole batches
    assert int(labels.sum()) > 25  # of 46 expected; a deviation is 4.8; uniform sampling would give 10
    data = listed([0] * 90 + [1] * 10, list(range(5)))
    assert data.weights() is None
    assert int(torch.cat([batch.labels for batch in data.train_dataloader()]).sum()) <= 10


def test_balanced_sampling_refuses_several_labels():
    data = listed([[True, False], [False, True], [True, True]], [2], sampling="balanced")
    with pytest.raises(UserError, match=r"data\.sampling=balanced needs one class per image; use class_weights="):
        data.train_dataloader()


# -- batches --


@pytest.mark.parametrize("kind", ["one", "several"])
def test_every_image_comes_with_its_own_label(kind):
    torch.manual_seed(1)
    labels = torch.arange(40) % 3 if kind == "one" else torch.rand(40, 3) < 0.5
    data = listed(labels)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            numbers = [int(name) for name in batch.sample_ids]
            assert torch.equal(batch.images.amax((1, 2, 3)).long(), torch.tensor(numbers))
            assert batch.labels.dtype == (torch.int64 if kind == "one" else torch.float32)
            assert batch.labels.shape == ((4,) if kind == "one" else (4, 3))
            assert torch.equal(batch.labels, labels[numbers].to(batch.labels.dtype))


def test_samples_without_labels_make_a_batch_without_labels():
    assert collate([[Sample(torch.zeros(1, 2, 2), name, 0, [])] for name in "ab"]).labels is None


@pytest.mark.parametrize("kind", ["one", "several"])
def test_broken_images_are_replaced_with_their_labels_to_learn_and_left_out_to_count(kind, tmp_path):
    write(tmp_path, *[f"{number}.png" for number in range(8)])
    for number in (1, 2, 7):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    splits = ["train"] * 4 + ["val"] * 4
    text = "".join(
        f"{number}.png,{('xy'[number % 2]) if kind == 'one' else ['x;y', 'x', '', 'y;z'][number % 4]},{split}\n"
        for number, split in enumerate(splits)
    )
    source = table(tmp_path, "image,label,split\n" + text, multi_label=kind == "several")
    path, file = str(tmp_path), str(tmp_path / "labels.csv")
    data = TableDataModule(path=path, table=file, multi_label=kind == "several", **OPTIONS)
    (batch,) = data.train_dataloader()
    assert Counter(batch.sample_ids) == {"0.png": 1, "3.png": 3}  # 3 stands in for 1 and 2
    assert {name for name, _ in batch.broken} == {"1.png", "2.png"}
    numbers = [int(name[0]) for name in batch.sample_ids]
    assert torch.equal(batch.labels, source.labels[numbers].to(batch.labels.dtype))
    assert not torch.equal(source.labels[3], source.labels[2])  # else the broken one's label would do
    (batch,) = data.val_dataloader()
    assert batch.sample_ids == ["4.png", "5.png", "6.png", "4.png"]  # to pre-train, the next one does
    data.leave_out_broken = True
    (batch,) = data.val_dataloader()
    assert batch.sample_ids == ["4.png", "5.png", "6.png", "7.png"]
    assert [name for name, _ in batch.broken] == ["7.png"]
    assert torch.equal(batch.labels[:3], source.labels[4:7].to(batch.labels.dtype))
    assert batch.labels[3].eq(LEFT_OUT).all()
    assert batch.labels.dtype == (torch.int64 if kind == "one" else torch.float32)
    assert batch.images.amax((1, 2, 3)).tolist() == [50, 60, 70, 0]
    assert torch.equal(data.labelled.labels, source.labels)  # left out in the batch alone


def test_the_fingerprint_changes_with_a_label():
    labels = [0, 1, 0, 1, 2]
    before = listed(labels).fingerprint()
    assert before == listed(labels, shots=1, seed=4).fingerprint()
    assert before != listed([0, 1, 1, 1, 2]).fingerprint()
    several = [[True, False], [False, True], [True, True]]
    assert listed(several).fingerprint() != listed([[True, False], [False, True], [False, True]]).fingerprint()


# -- pre-training --


def test_pretraining_takes_no_notice_of_labels(tmp_path):
    """The same pictures make the same steps, whichever classes they are in."""
    for name in "ab":
        write_images(tmp_path / "images" / name, 12)
    lines = []
    for data in ("folder", "imagefolder"):
        options = ["epochs=1", f"data={data}", "data.path=images", "data.num_workers=0", f"run_name={data}"]
        result = pretrain(tmp_path, *MICRO, *options)
        assert result.code == 0, result.err
        text = (tmp_path / "outputs" / "pretrain" / data / "metrics.jsonl").read_text()
        lines.append([json.loads(line) for line in text.splitlines()])
    losses = [[{key: line[key] for key in line if "loss" in key} for line in run] for run in lines]
    assert any("val_loss" in line for line in losses[0])
    assert losses[0] == losses[1]
    one, other = FolderDataModule(path=str(tmp_path / "images"), **without_labels()), folders(tmp_path / "images")
    for loader in ("train_dataloader", "val_dataloader"):
        pairs = list(zip(getattr(one, loader)(), getattr(other, loader)(), strict=True))
        assert pairs
        for mine, its in pairs:
            assert mine.sample_ids == its.sample_ids
            assert torch.equal(mine.images, its.images)
            assert mine.labels is None


def without_labels() -> dict[str, Any]:
    return {name: value for name, value in OPTIONS.items() if name not in ("fraction", "shots", "sampling")}


def test_images_without_labels_are_kept_in_their_share(tmp_path):
    """Of 20 images 12 have no label, which tells something too."""
    write(tmp_path, *[f"{number}.png" for number in range(30)])
    rows = [
        f"{number}.png,{['x', 'y', '', '', ''][number % 5]},{'val' if number >= 20 else 'train'}\n"
        for number in range(30)
    ]
    table(tmp_path, "image,label,split\n" + "".join(rows), multi_label=True)
    path, file = str(tmp_path), str(tmp_path / "labels.csv")
    data = TableDataModule(path=path, table=file, multi_label=True, **OPTIONS | {"fraction": 0.5})
    assert Counter(number % 5 in (0, 1) for number in data.split()[0]) == {True: 4, False: 6}


def test_the_fingerprint_tells_the_part_to_validate_with(tmp_path):
    write(tmp_path, *[f"{number}.png" for number in range(4)])
    found = set()
    for held_out in (2, 3):
        rows = "".join(f"{n}.png,{'xy'[n % 2]},{'val' if n == held_out else 'train'}\n" for n in range(4))
        table(tmp_path, "image,label,split\n" + rows, multi_label=False)
        path, file = str(tmp_path), str(tmp_path / "labels.csv")
        found.add(TableDataModule(path=path, table=file, multi_label=False, **OPTIONS).fingerprint())
    assert len(found) == 2
