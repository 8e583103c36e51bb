"""Where the images of `data=folder` come from: folders, images, lists of images, several of them."""

import os
import pickle
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from micro import MICRO, pretrain, write_images
from PIL import Image

from fcmae import UserError
from fcmae.data.folder import Folder, FolderDataModule, find_images
from fcmae.data.image_lists import read_list
from fcmae.data.imagefolder import ImageFolder
from fcmae.data.names import Names
from fcmae.data.transforms import Crop

OPTIONS: dict[str, Any] = {
    "image_size": 32,
    "batch_size": 4,
    "val_images": 8,
    "augment": Crop(crop_scale=[0.2, 1.0], flip=True),
    "num_workers": 0,
    "timeout": 0,
    "max_broken": 1.0,
    "repeats": 1,
    "samples_per_epoch": None,
    "seed": 0,
}


def folder_data(path: Any, in_chans: int = 3) -> FolderDataModule:
    return FolderDataModule(path=path, in_chans=in_chans, mean=[0.5] * in_chans, std=[0.5] * in_chans, **OPTIONS)


def ids(path: Any) -> list[str]:
    """The images that data.path=... gives, after checking that each can be opened and has a name of its own."""
    source = folder_data([str(entry) for entry in path] if isinstance(path, list) else str(path)).source
    names = [source.sample_id(index) for index in range(len(source))]
    assert len(set(names)) == len(names)
    assert all(source.open(index).size == (2, 3) for index in range(len(source)))
    return names


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2)).save(root / name, "PNG")


def write_list(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def write_parquet(file: Path, **columns: Any) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), file)
    return file


def refused(path: Any, root: Path, in_chans: int = 3) -> str:
    with pytest.raises(UserError) as caught:
        _ = folder_data(path, in_chans).source
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(root), "ROOT")


# -- names --


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_names_are_a_list_in_little_memory(texts):
    names = Names(iter(texts))
    assert list(names) == texts
    assert len(names) == len(texts)
    assert [names[-place] for place in range(1, len(texts) + 1)] == texts[::-1]
    for part in (slice(2), slice(1, None, 2), slice(None, None, -1), slice(-3, None)):
        assert names[part] == texts[part]
    for beyond in (len(texts), -len(texts) - 1):
        with pytest.raises(IndexError):
            names[beyond]
    assert list(pickle.loads(pickle.dumps(names))) == texts


def test_names_take_their_bytes_and_one_number_each():
    names = Names(f"class {number % 7}/image {number:06d}.png" for number in range(10000))
    assert len(pickle.dumps(names)) < 10000 * (len(names[0]) + 8) + 1000
    assert isinstance(folder_names := Folder(path=".", in_chans=3, names=["a"])._names, Names), type(folder_names)


# -- folders --


def test_several_folders_are_named_from_the_deepest_one_that_holds_them(tmp_path):
    write(tmp_path, "all/a/1.png", "all/b/deep/1.png", "all/c/1.png", "1.png")
    wanted = ["a/1.png", "b/deep/1.png"]
    assert ids([tmp_path / "all" / "a", tmp_path / "all" / "b"]) == wanted
    assert ids([tmp_path / "all" / "b", tmp_path / "all" / "a"]) == wanted
    (tmp_path / "all" / "b" / "deep" / "1.png").rename(tmp_path / "all" / "b" / "2.png")
    assert ids([tmp_path / "all" / "a", tmp_path / "all" / "b"]) == ["a/1.png", "b/2.png"]
    assert ids([tmp_path / "all" / "b"]) == ids(tmp_path / "all" / "b") == ["2.png"]


def test_paths_may_be_relative_and_of_the_home(tmp_path, monkeypatch):
    write(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert ids(["../a", "../b"]) == ["a/1.png", "b/1.png"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ids(["~/a", str(tmp_path / "b")]) == ["a/1.png", "b/1.png"]
    assert ids("~/a") == ["1.png"]


@pytest.mark.parametrize("link", [False, True], ids=["below", "link"])
def test_an_image_of_two_folders_is_taken_once(link, tmp_path):
    write(tmp_path, "a/1.png", "a/b/2.png")
    inner = tmp_path / "a" / "b"
    if link:
        inner = tmp_path / "z"
        inner.symlink_to(tmp_path / "a" / "b")
    assert (
        ids([tmp_path / "a", inner])
        == ids([inner, tmp_path / "a"])
        == (["a/1.png", "a/b/2.png"] if link else ["1.png", "b/2.png"])
    )
    (tmp_path / "a" / "1.png").unlink()
    assert len(ids([inner, tmp_path / "a"])) == 1  # all that a holds is in b, which is no fault
    assert ids([tmp_path / "a", tmp_path / "a"])[0].endswith("2.png")


def test_which_of_two_links_counts_does_not_depend_on_the_disk(tmp_path, monkeypatch):
    write(tmp_path, "elsewhere/1.png")
    (tmp_path / "root").mkdir()
    for name in ("m", "c", "x"):
        (tmp_path / "root" / name).symlink_to(tmp_path / "elsewhere")
    scandir = os.scandir

    class Shuffled:
        def __init__(self, path: Any) -> None:
            self.entries = sorted(scandir(path), key=lambda entry: entry.name, reverse=random.random() < 0.5)

        def __enter__(self) -> Any:
            return iter(self.entries)

        def __exit__(self, *args: object) -> None: ...

        def __iter__(self) -> Any:
            return iter(self.entries)

        def __next__(self) -> Any:
            if not self.entries:
                raise StopIteration
            return self.entries.pop(0)

        def close(self) -> None: ...

    monkeypatch.setattr(os, "scandir", Shuffled)
    assert {tuple(ids(tmp_path / "root")) for _ in range(10)} == {("c/1.png",)}


def test_links_in_a_circle_end(tmp_path):
    write(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "a").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    assert ids(tmp_path) == ["a/1.png", "a/b/2.png"]


def test_odd_names(tmp_path):
    odd = [
        " .png",
        "a b/ c .png",
        "日本語/ÄÖÜ ß.PNG",
        "e\u0301.png",
        "\u00e9.png",
        "#1.png",
        "a,b;c'\"d.png",
        "%20.png",
    ]
    write(tmp_path, *odd, ".hidden.png", ".hidden/1.png", "a b/.trash/2.png", "._1.png")
    (tmp_path / "not.png.txt").write_text("")
    assert ids(tmp_path) == sorted(odd)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep no names that are no UTF-8")
def test_a_name_that_is_no_utf_8_can_be_read_and_shown(tmp_path):
    write(tmp_path, "good.png")
    (tmp_path / "good.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    assert ids(tmp_path) == ["caf\\xe9.png"]
    assert folder_data(str(tmp_path)).names_digest()


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path, "a/1.png", "locked/2.png")
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # the tests may run as root, who may read everything
    wanted = "cannot read the folder ROOT/locked: Permission denied; mend its permissions"
    assert refused(str(tmp_path), tmp_path) == wanted
    assert refused([str(tmp_path / "a"), str(tmp_path / "locked")], tmp_path) == wanted


def test_an_image_that_cannot_be_read_is_passed_over(tmp_path, monkeypatch):
    write(tmp_path, "1.png", "2.png", "3.png")
    (tmp_path / "2.png").unlink()
    (tmp_path / "2.png").symlink_to(tmp_path / "gone.png")
    source = folder_data(str(tmp_path)).source
    assert len(source) == 3
    with pytest.raises(FileNotFoundError):
        source.open(1)


# -- images and lists --


def test_single_images(tmp_path):
    write(tmp_path, "a/1.png", "a/2.PNG", "b/3.png")
    assert ids(tmp_path / "a" / "2.PNG") == ["2.PNG"]
    assert ids([tmp_path / "a" / "1.png", tmp_path / "b"]) == ["a/1.png", "b/3.png"]
    assert ids([tmp_path / "a" / "1.png", tmp_path / "a"]) == ["1.png", "2.PNG"]


def _text(file: Path, paths: list[str]) -> None:
    write_list(file, "\ufeff# images\n\n" + "\r\n".join(f"  {path}  " for path in paths) + "\n   \n#end")


def _table(file: Path, paths: list[str]) -> None:
    write_list(file, "label,image\n" + "".join(f'1,"{path}"\n' for path in paths))


def _one_column(file: Path, paths: list[str]) -> None:
    write_list(file, "\ufefffile name\n" + "".join(f'"{path}"\n\n' for path in paths))


def _parquet(file: Path, paths: list[str]) -> None:
    write_parquet(file, path=paths, label=list(range(len(paths))))


KINDS = {"list.txt": _text, "list.csv": _table, "list.CSV": _one_column, "list.parquet": _parquet}


@pytest.mark.parametrize("kind", KINDS)
def test_lists(kind, tmp_path):
    write(tmp_path, "lists/b c.png", "lists/ä/1.png", "lists/unlisted.png", "up.png", "other/no extension")
    paths = ["ä/1.png", "./b c.png", "../up.png", str(tmp_path / "other" / "no extension"), "ä/../b c.png"]
    file = tmp_path / "lists" / kind
    KINDS[kind](file, paths)
    wanted = ["../other/no extension", "../up.png", "b c.png", "ä/1.png"]  # one of them stands there twice
    assert ids(file) == ids([file]) == wanted
    from_above = ["lists/b c.png", "lists/ä/1.png", "other/no extension", "up.png"]
    assert ids([file, tmp_path / "up.png"]) == from_above
    assert ids([file, tmp_path]) == sorted([*from_above, "lists/unlisted.png"])


def test_two_lists_of_the_same_name(tmp_path):
    for name in "ab":
        write(tmp_path, f"{name}/1.png")
        write_list(tmp_path / name / "train.txt", "1.png\n")
    assert ids([tmp_path / name / "train.txt" for name in "ab"]) == ["a/1.png", "b/1.png"]


def test_images_that_are_given_twice_are_said_to_be(tmp_path, caplog):
    write(tmp_path, "1.png", "2.png")
    file = write_list(tmp_path / "list.txt", "1.png\n2.png\n1.png\n")
    assert ids(file) == ["1.png", "2.png"]
    assert "images given more than once, each taken once: 1" in caplog.text


def test_a_folder_called_like_a_list_is_a_folder(tmp_path):
    write(tmp_path, "images.txt/1.png", "images.png/2.png")
    assert ids(tmp_path / "images.txt") == ["1.png"]
    assert ids([tmp_path / "images.txt", tmp_path / "images.png"]) == ["images.png/2.png", "images.txt/1.png"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"# none\n\n", "data.path=ROOT/x.txt lists no image: add a path for each"),
        ("x.csv", b"", "data.path=ROOT/x.csv has no column 'image' or 'path', only none: name the one of paths"),
        ("x.csv", b"image\n", "data.path=ROOT/x.csv lists no image: add a path for each"),
        ("x.csv", b"a,b\n1,2\n", "data.path=ROOT/x.csv has no column 'image' or 'path', only a, b: name the one .*"),
        ("x.csv", b"1.png\n2.png\n", "data.path=ROOT/x.csv: line 1 names an image, not the columns: put a line .*"),
        ("x.csv", b"label,image\n1,1.png\n2\n", "data.path=ROOT/x.csv, line 3: no image is named: fill the cell, .*"),
        ("x.csv", b"image,x\n ,2\n", "data.path=ROOT/x.csv, line 2: no image is named: .*"),
        ("x.csv", b'image\n"1.png\n2.png', r"data.path=ROOT/x.csv cannot be read \(unexpected end of data\): .*"),
        ("x.txt", b"caf\xe9.png", r"data.path=ROOT/x.txt cannot be read \('utf-8' codec .*\): name a list .* UTF-8"),
        ("x.parquet", b"PAR?", "data.path=ROOT/x.parquet is no Parquet file .*: write it anew"),
        ("x.txt", b"1.png\n2.png\n3.png\n4.png", r"data.path=ROOT/x.txt: none of its first 4 images exists "
         r"\(ROOT/1.png, ROOT/2.png, ROOT/3.png\): its paths start from its own folder, ROOT"),
        ("x.txt", b"n.png\n" * 150, r"data.path=ROOT/x.txt: none of its first 100 images exists .*"),
        ("x.gif", b"GIF89a", "ROOT/x.gif is a file: name a folder of images"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("several", [False, True], ids=["alone", "one of two"])
def test_lists_are_refused(name, content, message, several, tmp_path):
    write(tmp_path, "a/1.png")
    (tmp_path / name).write_bytes(content)
    path = [str(tmp_path / "a"), str(tmp_path / name)] if several else str(tmp_path / name)
    found = refused(path, tmp_path)
    assert re.fullmatch(message, found), found


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [1, 2]}, "data.path=ROOT/x.parquet: column 'image' holds int64, not paths: make it text"),
        ({"image": [{"path": "1.png"}]}, r"data.path=ROOT/x.parquet: column 'image' holds struct<.*>, not paths: .*"),
        ({"image": ["1.png", None]}, "data.path=ROOT/x.parquet, row 2: no image is named: fill the cell, or .*"),
        ({"a": ["x"], "b": ["y"]}, "data.path=ROOT/x.parquet has no column 'image' or 'path', only a, b: .*"),
    ],
)
def test_parquet_columns_are_refused(columns, message, tmp_path):
    file = write_parquet(tmp_path / "x.parquet", **columns)
    found = refused(str(file), tmp_path)
    assert re.fullmatch(message, found), found


def test_parquet_says_which_package_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"")
    wanted = "data.path=ROOT/x.parquet: to read Parquet needs pip install 'fcmae[parquet]'"
    assert refused(str(tmp_path / "x.parquet"), tmp_path) == wanted


def test_parquet_of_many_rows_and_of_categories(tmp_path):
    import pyarrow

    paths = [f"{number}.png" for number in range(70000)]  # more than one batch
    assert read_list(write_parquet(tmp_path / "x.parquet", image=paths)) == paths
    categories = pyarrow.array(["a.png", "b.png", "a.png"]).dictionary_encode()
    assert read_list(write_parquet(tmp_path / "y.parquet", path=categories)) == ["a.png", "b.png", "a.png"]


def test_files_that_a_list_names_and_that_are_missing_are_broken_images(tmp_path):
    write(tmp_path, "3.png")
    file = write_list(tmp_path / "list.txt", "1.png\n2.png\n3.png\n4.png\n5.png\n")
    data = folder_data(str(file))
    (batch,) = data.train_dataloader()
    assert set(batch.sample_ids) == {"3.png"}
    assert {name for name, _ in batch.broken} <= {"1.png", "2.png", "4.png", "5.png"}
    assert all("FileNotFoundError" in reason for _, reason in batch.broken)
    assert batch.broken


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda root: [], r"data.path=\[\] names nothing: give a folder of images, or several"),
        (lambda root: [str(root / "a"), str(root / "b")], "ROOT/b does not exist: name a folder of images"),
        (
            lambda root: [str(root / "a"), str(root / "empty")],
            "ROOT/empty holds no image: looked in all its folders .*",
        ),
        (lambda root: str(root / "gone.txt"), "ROOT/gone.txt does not exist: name a folder of images"),
        (lambda root: str(root / "empty"), "ROOT/empty holds no image: looked in all its folders for .bmp, .*"),
    ],
)
def test_what_is_no_image_is_refused(given: Callable[[Path], Any], message: str, tmp_path: Path):
    write(tmp_path, "a/1.png")
    (tmp_path / "empty").mkdir()
    found = refused(given(tmp_path), tmp_path)
    assert re.fullmatch(message, found), found


def test_other_folders_still_take_names_and_lists(tmp_path):
    write(tmp_path, "x/1.png", "y/2.png", "stray.png")
    assert find_images([tmp_path]) == (tmp_path, None)
    source = Folder(path=tmp_path, in_chans=3, names=["y/2.png"])
    assert [source.sample_id(index) for index in range(len(source))] == ["y/2.png"]
    classes = ImageFolder(path=tmp_path, in_chans=3)
    assert [classes.sample_id(index) for index in range(len(classes))] == ["x/1.png", "y/2.png"]


# -- channels --


@pytest.mark.parametrize(
    ("mode", "in_chans", "message"),
    [
        ("RGBA", 5, r"1.png has 4 channels \(RGBA\), not data.in_chans=5: set data.in_chans, .* to the files'"),
        ("RGB", 4, r"1.png has 3 channels \(RGB\), not data.in_chans=4: .*"),
        ("L", 2, r"1.png has 1 channels \(L\), not data.in_chans=2: .*"),
    ],
)
def test_channels_that_the_files_have_not_are_refused(mode, in_chans, message, tmp_path):
    (tmp_path / "0.png").write_bytes(b"broken")
    for number in (1, 2):
        Image.new(mode, (3, 2)).save(tmp_path / f"{number}.png")
    found = refused(str(tmp_path), tmp_path, in_chans=in_chans)
    assert re.fullmatch(message, found), found


@pytest.mark.parametrize("in_chans", [3, 7])
def test_channels_of_arrays_are_checked_too(in_chans, tmp_path):
    np.save(tmp_path / "0.npy", np.zeros((8, 9, 12), dtype=np.uint16))
    assert len(folder_data(str(tmp_path), in_chans=12).source) == 1
    found = refused(str(tmp_path), tmp_path, in_chans=in_chans)
    assert re.match(rf"0.npy has an array of shape \(8, 9, 12\).* data.in_chans={in_chans}\b", found), found


def test_broken_images_alone_do_not_keep_a_source_from_being_loaded(tmp_path):
    for number in range(120):
        (tmp_path / f"{number}.png").write_bytes(b"broken")
    assert len(folder_data(str(tmp_path)).source) == 120


# -- as typed --


def test_runs_on_a_list_of_folders_and_lists(tmp_path):
    write_images(tmp_path / "a", 12)
    write_images(tmp_path / "b", 12)
    write_list(tmp_path / "b" / "few.csv", "image\n" + "".join(f"{number:03d}.png\n" for number in range(8)))
    options = [*MICRO, "data=folder", "data.num_workers=0", "data.batch_size=4", "epochs=1"]
    result = pretrain(tmp_path, *options, "data.path=[a,b/few.csv]")
    assert result.code == 0, result.err
    assert "data: 16 images to train on, 4 held out" in result.err
    again = pretrain(tmp_path, *options, "data.path=[a,gone]", "run_name=x")
    assert again.only_error == "gone does not exist: name a folder of images"
    channels = ["data.in_chans=4", "data.mean=[0.5,0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5,0.5]", "run_name=y"]
    found = pretrain(tmp_path, *options, "data.path=a", *channels).only_error
    assert found.startswith("000.png has 3 channels (RGB), not data.in_chans=4: set data.in_chans")
    assert not (tmp_path / "outputs" / "pretrain" / "y").exists()
