"""Hugging Face data sets: the same images however they are stored, each once per epoch, also after a stop."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from micro import RUN, SMOKE, pretrain
from PIL import Image

from fcmae import UserError
from fcmae.command_line.launch import config_folder
from fcmae.data.decoding import open_picture
from fcmae.data.hf import HFDataModule
from fcmae.data.hf_columns import encode_labels
from fcmae.data.parquet_shards import ParquetImages
from fcmae.data.picture import to_tensor
from fcmae.data.transforms import Crop

datasets = pytest.importorskip("datasets", reason="data=hf is tested where datasets is installed")
pa = pytest.importorskip("pyarrow", reason="data=hf is tested where pyarrow is installed")
constants = pytest.importorskip("huggingface_hub.constants", reason="data=hf is tested where datasets is installed")
pq = pytest.importorskip("pyarrow.parquet", reason="data=hf is tested where pyarrow is installed")

COUNTS = {"train": 24, "validation": 6}
STORED = ["folder", "parquet", "parquets", "saved"]
STREAMED = ["parquet", "parquets"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in every form: a folder per class; one Parquet file per split; several; by save_to_disk."""
    root = tmp_path_factory.mktemp("stored")
    numbers = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for index in range(count):
            file = root / "folder" / split / "abc"[index * 3 // count] / f"{index:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            shape, most, kind = [((9, 8, 3), 256, "u1"), ((9, 8), 256, "u1"), ((9, 8), 65536, "u2")][index % 3]
            Image.fromarray(numbers.integers(0, most, shape).astype(kind)).save(file)
    whole = {}
    for split in COUNTS:
        files = pictures(root, split)
        images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
        labels = ["abc".index(file.parent.name) for file in files]
        whole[split] = dataset({"image": images, "label": labels})
        write_parquet(whole[split], root / "parquet" / f"{split}.parquet", 4)
        for number in range(3):
            file = root / "parquets" / "data" / f"{split}-0000{number}-of-00003.parquet"
            write_parquet(whole[split].shard(3, number, contiguous=True), file, 3)
    datasets.DatasetDict(whole).save_to_disk(root / "saved")
    whole["train"].save_to_disk(root / "alone")
    return root


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def dataset(columns: dict[str, list[Any]], **features: Any) -> Any:
    known = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"]), **features}
    return datasets.Dataset.from_dict(columns, features=datasets.Features({name: known[name] for name in columns}))


def write_parquet(data: Any, file: Path, rows: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    data.to_parquet(str(file), batch_size=rows)


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), value).save(file, "PNG")
    return file.getvalue()


def pictures(stored: Path, split: str) -> list[Path]:
    return sorted((stored / "folder" / split).rglob("*.png"))


def hf(path: Path | str, **options: Any) -> HFDataModule:
    """With the defaults of its YAML file, which are thereby all arguments."""
    defaults = yaml.safe_load((config_folder() / "data" / "hf.yaml").read_text())
    assert defaults.pop("_target_") == "fcmae.data.hf.HFDataModule"
    few = {
        "image_size": 32,
        "batch_size": 3,
        "num_workers": 0,
        "seed": 0,
        "augment": Crop(crop_scale=[0.2, 1.0], flip=True),
    }
    return HFDataModule(**{**defaults, **few, "path": str(path), **options})


def epoch(data: HFDataModule, number: int, rank: int = 0, world_size: int = 1) -> list[Any]:
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        accumulate_grad_batches=1,
        global_rank=rank,
        world_size=world_size,
        num_devices=world_size,
        limit_train_batches=1.0,
    )
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
    return list(loader)


def names(batches: list[Any]) -> list[str]:
    return [name for batch in batches for name in batch.sample_ids]


# -- what is read --


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize(("form", "streaming"), [*[(form, False) for form in STORED], *[(f, True) for f in STREAMED]])
def test_every_form_gives_the_same_images_and_labels(stored, form, streaming, in_chans):
    few = {"in_chans": in_chans, "mean": [0.5] * in_chans, "std": [0.5] * in_chans}
    data = hf(stored / form, val_split="validation", streaming=streaming, **few)
    files = [file for split in COUNTS for file in pictures(stored, split)]
    assert len(data.source) == len(files) == 30
    for index, file in enumerate(files):
        wanted = open_picture(file, name=file.name, in_chans=in_chans)
        picture = data.source.open(index)
        assert picture.size == wanted.size == (9, 8)
        assert torch.equal(to_tensor(picture.decode()), to_tensor(wanted.decode()))
    assert data.class_names == ["a", "b", "c"]
    assert data.labels.tolist() == ["abc".index(file.parent.name) for file in files]
    assert [list(part) for part in data.split()] == [list(range(24)), list(range(24, 30))]


def test_samples_are_named_by_where_they_lie(stored):
    def names_of(form: str, **options: Any) -> list[str]:
        source = hf(stored / form, **options).source
        ids = [source.sample_id(index) for index in range(len(source))]
        assert len(set(ids)) == len(ids)
        return [ids[0], ids[-1]]

    assert names_of("folder", val_split="validation") == ["train:0", "validation:5"]
    assert names_of("alone") == ["train:0", "train:23"]
    assert names_of("parquet", streaming=True) == ["train.parquet#0:0", "train.parquet#5:3"]
    several = names_of("parquets", streaming=True, val_split="validation")
    assert several == ["train-00000-of-00003.parquet#0:0", "validation-00002-of-00003.parquet#0:1"]


def test_a_part_is_held_out_where_there_is_no_split_for_it(stored):
    whole, streamed = hf(stored / "parquet").split(), hf(stored / "parquet", streaming=True).split()
    assert streamed == (range(20), range(20, 24))  # so that few row groups are read to validate
    assert sorted([*whole[0], *whole[1]]) == list(range(24))
    assert len(whole[1]) == 4
    assert list(whole[1]) != list(range(20, 24))  # sorted by class, as so often


def test_no_class_loses_all_its_images_to_validation(tmp_path):
    columns = {"image": [{"bytes": png(n), "path": None} for n in range(80)], "labels": [n // 2 for n in range(80)]}
    write_parquet(dataset(columns, labels=datasets.Value("int16")), tmp_path / "train.parquet", 40)
    data = hf(tmp_path)
    assert int(data.class_counts().min()) == 1
    assert len(data.split()[1]) >= 10


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_may_be_strings_numbers_or_missing(tmp_path, streaming):
    columns = {"image": [{"bytes": png(n), "path": None} for n in range(10)], "labels": ["x", "y"] * 5}
    write_parquet(dataset(columns, labels=datasets.Value("string")), tmp_path / "a" / "train.parquet", 4)
    columns["labels"] = [7, 30] * 5
    write_parquet(dataset(columns, labels=datasets.Value("int16")), tmp_path / "b" / "train.parquet", 4)
    del columns["labels"]
    write_parquet(dataset(columns), tmp_path / "c" / "train.parquet", 4)
    for folder, class_names in (("a", ["x", "y"]), ("b", ["7", "30"])):
        data = hf(tmp_path / folder, streaming=streaming)
        assert data.class_names == class_names
        assert data.labels.tolist() == [0, 1] * 5
        assert hf(tmp_path / folder, streaming=streaming, label_column="none").labelled.labels is None
        assert hf(tmp_path / folder, streaming=streaming, label_column=None).labelled.labels is None
    without = hf(tmp_path / "c", streaming=streaming)
    assert len(names(epoch(without, 0))) == 6  # two steps
    with pytest.raises(UserError, match="the images have no labels"):
        without.labels  # noqa: B018


@pytest.mark.parametrize("streaming", [False, True])
def test_images_are_not_touched_to_find_labels(tmp_path, streaming, monkeypatch):
    columns = {"image": [{"bytes": b"no image", "path": None}] * 10, "label": [0, 1] * 5}
    write_parquet(dataset(columns), tmp_path / "train.parquet", 4)
    monkeypatch.setattr(ParquetImages, "_read", None)
    assert hf(tmp_path, streaming=streaming).labels.tolist() == [0, 1] * 5


def test_a_column_of_plain_bytes_can_be_named(tmp_path):
    values = np.arange(2 * 4 * 5, dtype=np.uint16).reshape(2, 4, 5)
    tiff, npy = io.BytesIO(), io.BytesIO()
    Image.fromarray(values[0]).save(tiff, "TIFF")
    np.save(npy, values[0])
    table = pa.table({"picture": [tiff.getvalue(), npy.getvalue(), png(7)]})
    pq.write_table(table, tmp_path / "train.parquet")
    for streaming in (False, True):
        with pytest.raises(UserError, match="no column holds images: name one"):
            hf(tmp_path, streaming=streaming).source  # noqa: B018
        source = hf(tmp_path, streaming=streaming, image_column="picture").source
        for index in range(2):  # told by their first bytes
            pixels = to_tensor(source.open(index).decode())
            assert torch.equal(pixels[0], torch.from_numpy(values[0].astype(np.float32) / 65535))
        assert to_tensor(source.open(2).decode()).unique().tolist() == [7]


@given(st.lists(st.one_of(st.none(), st.integers(-3, 3)), min_size=1), st.booleans())
def test_labels_of_a_plain_column_are_its_values_in_order(values, text):
    kind, feature = (pa.string(), "string") if text else (pa.int32(), "int32")
    cells = [None if value is None else (str(value) if text else value) for value in values]
    column = pa.chunked_array([pa.array(cells[:2], type=kind), pa.array(cells[2:], type=kind).dictionary_encode()][:1])
    column = pa.chunked_array([*column.chunks, pa.array(cells[2:], type=kind)])
    found = sorted({cell for cell in cells if cell is not None})
    if None in cells or len(found) < 2:
        with pytest.raises(UserError, match="have no label" if None in cells else "at least 2 are needed"):
            encode_labels([column], datasets.Value(feature), name="label")
        return
    class_names, labels = encode_labels([column, column], datasets.Value(feature), name="label")
    assert class_names == [str(value) for value in found]
    assert [class_names[label] for label in labels] == [str(cell) for cell in cells] * 2


def test_a_class_that_a_column_spells_in_two_ways_is_refused():
    column = pa.chunked_array([["1", "2"], ["x", "1.0", "2"]])
    message = r"data\.label_column=kind: '1' \(row 1\) and '1\.0' \(row 4\) are one class: write both in one way"
    with pytest.raises(UserError, match=message):
        encode_labels([column], datasets.Value("string"), name="kind")


# -- the order --


@pytest.mark.parametrize("streaming", [False, True])
def test_two_ranks_with_two_workers_see_every_image_once(stored, streaming):
    options = {"streaming": streaming, "val_split": "validation", "num_workers": 2, "mixed_shards": 2}
    ranks = [names(epoch(hf(stored / "parquets", **options), 1, rank, world_size=2)) for rank in range(2)]
    source = hf(stored / "parquets", **options).source
    assert sorted(ranks[0] + ranks[1]) == sorted(source.sample_id(index) for index in range(24))
    assert len(ranks[0]) == len(ranks[1]) == 12


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_epoch_is_the_rest_and_the_next_is_another(stored, streaming):
    options = {"streaming": streaming, "val_split": "validation", "mixed_shards": 2}
    first, second = (epoch(hf(stored / "parquets", **options), number) for number in (0, 1))
    assert names(first) != names(second)
    assert sorted(names(first)) == sorted(names(second))
    for steps_done in (3, 8 + 5):
        resumed = hf(stored / "parquets", num_workers=2 * (steps_done > 8), **options)
        resumed.steps_done = steps_done
        number, step = divmod(steps_done, 8)
        rest, wanted = epoch(resumed, number), (first, second)[number][step:]
        assert names(rest) == names(wanted)
        assert all(torch.equal(mine.images, its.images) for mine, its in zip(rest, wanted, strict=True))
        assert all(torch.equal(mine.labels, its.labels) for mine, its in zip(rest, wanted, strict=True))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(rows=st.integers(5, 20), size=st.integers(1, 6), mixed=st.integers(1, 4), steps_done=st.integers(0, 4))
def test_row_groups_are_read_once_in_an_epoch_and_few_are_kept(tmp_path, monkeypatch, rows, size, mixed, steps_done):
    write_parquet(dataset({"image": [png(row) for row in range(rows)]}), tmp_path / "data" / "train.parquet", size)
    data = hf(tmp_path / "data", streaming=True, mixed_shards=mixed, batch_size=1)
    source, read = data.source, []
    read_images = ParquetImages._read

    def recording(self: ParquetImages, shard: Any, patience: Any) -> Any:
        read.append(shard.number)
        assert len(self._in_use) < mixed
        return read_images(self, shard, patience)

    with monkeypatch.context() as patch:
        patch.setattr(ParquetImages, "_read", recording)
        data.steps_done = steps_done
        count = len(data.split()[0])
        whole = names(epoch(data, steps_done // count))
    assert len(set(whole)) == len(whole) == count - steps_done % count
    assert read == list(dict.fromkeys(int(name.partition("#")[2].partition(":")[0]) for name in whole))
    assert [row % size for row in range(rows)] == [int(source.sample_id(row).rpartition(":")[2]) for row in range(rows)]
    assert [to_tensor(source.open(row).decode()).unique().tolist() for row in range(rows)] == [[n] for n in range(rows)]


@pytest.mark.parametrize(("form", "streaming"), [("folder", False), ("parquets", False), ("parquets", True)])
def test_sources_can_be_sent_to_workers_that_are_spawned(stored, form, streaming):
    source = hf(stored / form, streaming=streaming).source
    unused = len(pickle.dumps(source))
    pixels = to_tensor(source.open(5).decode())
    sent = pickle.dumps(source)
    assert len(sent) == unused < 20_000  # no images
    assert torch.equal(to_tensor(pickle.loads(sent).open(5).decode()), pixels)


# -- what goes wrong --


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_image_is_passed_over_and_named(tmp_path, streaming):
    cells: list[Any] = [png(n) for n in range(12)]
    cells[3], cells[4], cells[6] = b"no image", None, {"bytes": None, "path": "nowhere.png"}
    write_parquet(dataset({"image": cells}), tmp_path / "train.parquet", 4)
    batches = epoch(hf(tmp_path, streaming=streaming, batch_size=10, val_images=1), 0)
    places = ("train.parquet#0:3", "train.parquet#1:0", "train.parquet#1:2") if streaming else (3, 4, 6)
    broken = dict(entry for batch in batches for entry in batch.broken)
    train = {name if streaming else f"train:{name}" for name in places}
    assert train >= broken.keys()
    assert len(broken) >= 2  # one may be held out, or at the end
    for name, kind in zip(places, ("UnidentifiedImageError", "no image is stored", "FileNotFoundError"), strict=True):
        assert kind in broken.get(name if streaming else f"train:{name}", kind)


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("nowhere/at/all", {}, "data.path=.*nowhere/at/all does not exist: name a folder, or a data set on the hub"),
        ("parquet/train.parquet", {}, "train.parquet is a file: name a folder"),
        ("empty", {}, "cannot be loaded .*doesn't contain any data files"),
        ("tars", {}, "holds files for webdataset.*use images or .*, or data=webdataset"),
        ("broken", {}, "cannot be loaded .*check the files"),
        ("broken", {"streaming": True}, "train.parquet cannot be read .*: check the address, the file"),
        ("parquet", {"train_split": "test"}, "data.train_split=test is not one of train, validation"),
        ("saved", {"val_split": "test"}, "data.val_split=test is not one of train, validation"),
        ("alone", {"train_split": "validation"}, "data.train_split=validation is not one of train"),
        ("saved", {"val_split": "train"}, "data.val_split=train is data.train_split: leave it out"),
        ("saved", {"streaming": True}, "data.streaming=true is not for .*, which save_to_disk made"),
        ("saved", {"name": "x"}, "data.name=x is not for .*, which save_to_disk made"),
        ("folder", {"revision": "main"}, "data.revision=main is for names on the hub"),
        ("folder", {"streaming": True}, "holds others .imagefolder.: set data.streaming=false, or for a name on the"),
        ("parquet", {"name": "x"}, "BuilderConfig 'x' not found. Available: .'default'."),
        ("parquet", {"image_column": "x"}, "data.image_column=x is no column of images: the columns are image, label"),
        ("parquet", {"image_column": "label"}, "data.image_column=label is no column of images"),
        ("saved", {"label_column": "x"}, "data.label_column=x is no column of classes.*: the columns are image, label"),
        ("two", {}, r"several columns may hold the images \(one, two\): name one in data.image_column, of one, two"),
        ("two", {"streaming": True}, "several columns may hold the images"),
        ("coarse", {}, r"several columns may hold the labels \(label, coarse\): name one or none in data.label_column"),
        ("hidden", {}, "data.label_column=label: 2 of 4 images have no label"),
        ("hidden", {"streaming": True}, "data.label_column=label: 2 of 4 images have no label"),
        ("other", {"val_split": "validation"}, "its column 'label' is not that of train"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(stored, tmp_path, form, options, message):
    image, names_ = png(1), datasets.ClassLabel(names=["a", "b", "c"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "train.tar").write_bytes(bytes(1024))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    two = dataset({"one": [image] * 4, "two": [image] * 4}, one=datasets.Image(), two=datasets.Image())
    write_parquet(two, tmp_path / "two" / "train.parquet", 2)
    coarse = dataset({"image": [image] * 4, "label": [0] * 4, "coarse": [0] * 4}, coarse=names_)
    write_parquet(coarse, tmp_path / "coarse" / "train.parquet", 2)
    hidden = dataset({"image": [image] * 4, "label": [0, -1, 1, -1]})
    write_parquet(hidden, tmp_path / "hidden" / "train.parquet", 2)
    other = {
        "train": dataset({"image": [image], "label": [0]}),
        "validation": dataset({"image": [image], "label": [0]}, label=datasets.ClassLabel(names=["a", "z"])),
    }
    for name, split in other.items():
        split.save_to_disk(tmp_path / "other" / name)
    (tmp_path / "other" / "dataset_dict.json").write_text(json.dumps({"splits": [*other]}))
    path = stored / form if (stored / form).exists() else tmp_path / form
    with pytest.raises(UserError, match=message) as told:
        hf(path, **options).source  # noqa: B018
    assert len(str(told.value).splitlines()) == 1


def test_a_missing_package_is_named(stored, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'fcmae\[hf\]'"):
        hf(stored / "parquet").source  # noqa: B018


# -- a run --


def run_options(stored: Path, streaming: bool) -> list[str]:
    return [
        "+model=custom",
        *SMOKE,
        "data=hf",
        f"data.path={stored / 'parquets'}",
        f"data.streaming={str(streaming).lower()}",
        "data.val_split=validation",
        "data.mixed_shards=2",
        "data.num_workers=2",
        "save.every_n_steps=1",
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / RUN / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 6
    return state["state_dict"]


KILLED = """
from fcmae.training.pretraining import PretrainModule
step = PretrainModule.training_step

def killing(self, batch, batch_idx):
    if self.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)

PretrainModule.training_step = killing
pretrain(Path.cwd(), *sys.argv[1:])
"""


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_trains_and_validates(stored, tmp_path, streaming):
    result = pretrain(tmp_path, *run_options(stored, streaming))
    assert result.code == 0, result.err
    assert json.loads((tmp_path / RUN / "summary.json").read_text())["val_loss"] > 0
    assert weights(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_that_is_killed_goes_on_to_the_same_weights(stored, tmp_path, streaming):
    options = run_options(stored, streaming)
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    result = pretrain(tmp_path / "whole", *options)
    assert result.code == 0, result.err
    script = tmp_path / "killed.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_hf import *\n{KILLED}"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, script, *options], cwd=tmp_path / "killed", env=environment, timeout=300, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / RUN / "summary.json").exists()
    result = pretrain(tmp_path / "killed", *options)
    assert result.code == 0, result.err
    reference = weights(tmp_path / "whole")
    assert all(torch.equal(value, reference[name]) for name, value in weights(tmp_path / "killed").items())
