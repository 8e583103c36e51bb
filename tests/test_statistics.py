"""data.mean=auto: measured when a run begins, and whose numbers a run takes otherwise."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import yaml
from micro import MICRO, RUN, SMOKE, command, pretrain, write_images
from PIL import Image
from test_data import folder_data

from fcmae import UserError
from fcmae.data.statistics import channel_statistics

AUTO = ["data.mean=auto", "data.std=auto"]
FOLDER = [*MICRO, "data=folder", "data.path=images", "data.num_workers=0"]


def said(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())["data"]
    return content


@pytest.mark.parametrize("workers", [0, 2])
def test_mean_and_deviation_are_those_of_all_pixels_to_learn_from(workers, tmp_path):
    files = write_images(tmp_path, 40, size=(64, 64))
    data = folder_data(tmp_path, num_workers=workers)
    told: list[tuple[int, int]] = []
    mean, std = channel_statistics(data, lambda *progress: told.append(progress))
    pixels = np.stack([np.asarray(Image.open(files[index]), dtype=np.float64) for index in data.split()[0]]) / 255
    assert np.allclose(mean, pixels.mean((0, 1, 2)), atol=1e-6)
    assert np.allclose(std, pixels.std((0, 1, 2)), rtol=1e-5)
    assert told[-1] == (32, 32)


def test_many_bands_of_sixteen_bits(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (12, 5, 64, 64)).astype(np.uint16)
    for number, array in enumerate(values):
        tifffile.imwrite(tmp_path / f"{number:02d}.tif", array, photometric="minisblack")
    data = folder_data(tmp_path, in_chans=5, mean=[0.5] * 5, std=[0.5] * 5)
    mean, std = channel_statistics(data, lambda *progress: None)
    learned_from = values[list(data.split()[0])] / 65535
    assert np.allclose(mean, learned_from.mean((0, 2, 3)), atol=1e-6)
    assert np.allclose(std, learned_from.std((0, 2, 3)), rtol=1e-4)


def test_images_of_one_colour_are_refused(tmp_path):
    for number in range(6):
        Image.new("RGB", (64, 64), (number * 40, 7, 9)).save(tmp_path / f"{number}.png")
    with pytest.raises(UserError, match=r"data\.std=auto: channel 1 has one value in all of 5 images"):
        channel_statistics(folder_data(tmp_path), lambda *progress: None)


SCALES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "shares": ("uint16", lambda values: values),
    "bytes": ("uint8", lambda values: values // 257),
    "raw": ("float32", lambda values: values / 7),
    "signed": ("int16", lambda values: values // 2),
    "fractions": ("float32", lambda values: values / 77777),
    "fifths": ("float32", lambda values: values % 6 / 5),
    "flags": ("float32", lambda values: values % 2),
    "halves": ("float16", lambda values: values / 65535),
}


def scales(folder: Path, kinds: list[str]) -> None:
    """Six TIFFs of each kind, of values from 0 to 65535 and what becomes of them."""
    values = np.random.default_rng(0)
    for number, name in enumerate(kinds * 6):
        kind, change = SCALES[name]
        tifffile.imwrite(folder / f"{number:02d} {name}.tif", change(values.integers(0, 65536, (64, 64))).astype(kind))


@pytest.mark.parametrize("kinds", [["shares", "raw"], ["raw", "bytes"], ["fractions", "raw", "shares"]])
@pytest.mark.parametrize("workers", [0, 2])
def test_shares_beside_large_numbers_are_warned_of_once(kinds, workers, tmp_path, caplog):
    scales(tmp_path, kinds)
    data = folder_data(tmp_path, in_chans=1, mean=[0.5], std=[0.5], num_workers=workers)
    channel_statistics(data, lambda *progress: None)
    (record,) = caplog.records
    share = kinds[-1] if kinds[-1] != "raw" else kinds[0]
    assert re.fullmatch(
        rf"images on two scales, which no mean fits: \d\d {share}\.tif is read as shares of its integers' range "
        r"\(0 to 1\), \d\d raw\.tif as it is \(up to \d+(\.\d+)?\): save all with one type of numbers, or train on "
        r"one kind",
        record.getMessage(),
    )


@pytest.mark.parametrize(
    "kinds",
    [["raw"], ["shares"], ["signed"], ["shares", "bytes"], ["shares", "fractions"], ["signed", "raw"]]
    + [["raw", small] for small in ("fractions", "fifths", "flags", "halves")],
    ids="-".join,
)
def test_files_of_one_scale_are_not_warned_of(kinds, tmp_path, caplog):
    scales(tmp_path, kinds)
    channel_statistics(folder_data(tmp_path, in_chans=1, mean=[0.5], std=[0.5]), lambda *progress: None)
    assert not caplog.records


def test_a_run_keeps_the_numbers_and_what_follows_it_takes_them(tmp_path):
    write_images(tmp_path / "images", 24)
    for name in ("train", "val"):
        for label in ("a", "b"):
            write_images(tmp_path / "labelled" / name / label, 4)
    assert pretrain(tmp_path, *FOLDER, *AUTO, "epochs=1").code == 0
    numbers = said(tmp_path / RUN)
    assert len(numbers["mean"]) == len(numbers["std"]) == 3
    assert numbers["mean"] != [0.485, 0.456, 0.406]
    for file in (tmp_path / "images").iterdir():  # it goes on as it began, whatever the pictures are now
        Image.new("RGB", (80, 70), (1, 2, 3)).save(file)
    again = pretrain(tmp_path, *FOLDER, *AUTO, "epochs=1")
    assert again.code == 0
    assert "this run is finished" in again.err

    tuning = [f"checkpoint={RUN}", "data=imagefolder", "data.path=labelled", "data.num_workers=0", "epochs=1"]
    model = ["+model=custom", *[option for option in SMOKE if option.startswith(("model.depths", "model.dims"))]]
    sizes = ["data.image_size=64", "data.batch_size=4", "batch_augment=none", "optim.warmup_epochs=0", "trainer=cpu"]
    for name, typed, mean in (
        ("as-the-checkpoint", [], numbers["mean"]),
        ("auto", AUTO, numbers["mean"]),
        ("typed", ["data.mean=[0.1,0.2,0.3]"], [0.1, 0.2, 0.3]),
    ):
        done = command("finetune", tmp_path, *model, *tuning, *sizes, *typed, f"run_name={name}")
        assert done.code == 0, done
        found = said(tmp_path / "outputs" / "finetune" / name)
        assert found["mean"] == mean
        assert found["std"] == numbers["std"]


def test_numbers_of_a_start_that_saved_nothing_are_measured_anew(tmp_path):
    files = write_images(tmp_path / "images", 24)
    for file in files[::3]:
        file.write_bytes(b"broken")
    failed = pretrain(tmp_path, *FOLDER, *AUTO, "data.max_broken=0.01")
    assert "images cannot be read (data.max_broken=0.01)" in failed.error
    before = said(tmp_path / RUN)
    assert not [*(tmp_path / RUN / "checkpoints").iterdir()]
    for file in write_images(tmp_path / "others", 24):
        Image.fromarray(np.asarray(Image.open(file)) // 4).save(file)
    (tmp_path / RUN / "skipped.jsonl").unlink()
    assert pretrain(tmp_path, *FOLDER, *AUTO, "data.path=others", "epochs=1").code == 0
    now = said(tmp_path / RUN)
    assert np.allclose(before["mean"], 0.5, atol=0.01)
    assert np.allclose(now["mean"], 0.125, atol=0.01)
    assert np.allclose(np.array(now["std"]) * 4, before["std"], rtol=0.02)


def test_evaluation_asks_for_numbers(tmp_path):
    with pytest.raises(UserError, match=r"data\.mean=auto and data\.std=auto are measured in training; give numbers"):
        folder_data(tmp_path, mean="auto")
