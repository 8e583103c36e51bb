"""`python -m fcmae.bench what=pictures`: what is written and read. How fast anything is, is not tested."""

import functools
import io
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from rich.console import Console
from test_bench import compose, lines_of

from fcmae import UserError
from fcmae.bench import bench
from fcmae.benchmark.conditions import Conditions
from fcmae.benchmark.photographs import TILE, photographs, write_jpegs
from fcmae.benchmark.pictures import BASELINE, FLOOR, FloorReader, picture_tables, readers, run_pictures

BATCHED = [BASELINE, "folder", "shards, short side 256"]
NAMES = [*BATCHED, FLOOR]
CONDITIONS = Conditions(batch_size=2, image_size=(32, 48), repeats=3, warmup=1)


@pytest.fixture
def _no_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)


@pytest.mark.usefixtures("_no_scikit_image")
def test_pictures_are_jpegs_in_folders_of_classes_and_follow_from_the_seed(tmp_path: Path) -> None:
    first, same, other = (
        list(write_jpegs(tmp_path / name, (70, 50), 5, quality=90, seed=name == "c")) for name in "abc"
    )
    assert [str(file.relative_to(tmp_path / "a")) for file in first] == [
        f"{'ab'[index % 2]}/{index:04d}.jpg" for index in range(5)
    ]
    for file in first:
        with Image.open(file) as picture:
            assert (picture.format, picture.size) == ("JPEG", (70, 50))
    contents = [file.read_bytes() for file in first]
    assert contents == [file.read_bytes() for file in same]
    assert len({*contents, *(file.read_bytes() for file in other)}) == 10


@pytest.mark.usefixtures("_no_scikit_image")
def test_large_pictures_have_the_detail_of_small_ones(tmp_path: Path) -> None:
    sizes = {side: (side * TILE[0], side * TILE[1]) for side in (1, 3)}
    per_pixel = {
        side: np.mean([file.stat().st_size for file in write_jpegs(tmp_path / str(side), size, 6, quality=90, seed=0)])
        / (size[0] * size[1])
        for side, size in sizes.items()
    }
    assert 0.6 < per_pixel[3] / per_pixel[1] < 1.6  # enlarged ones would have a third


def test_photographs_are_those_of_the_packages_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    alone = photographs()
    assert sorted(alone) == ["china", "flower"]
    made = np.zeros((400, 600, 3), dtype=np.uint8)
    data = SimpleNamespace(astronaut=lambda: made, coffee=lambda: made, rocket=lambda: made)
    monkeypatch.setitem(sys.modules, "skimage", SimpleNamespace(data=data))
    found = photographs()
    assert sorted(found) == ["astronaut", "china", "coffee", "flower", "rocket"]
    for image in found.values():
        assert image.dtype == np.uint8
        assert image.shape[2] == 3
        assert image.shape[0] >= TILE[1]
        assert image.shape[1] >= TILE[0]


def test_all_readers_give_the_same_kind_of_images(tmp_path: Path) -> None:
    files = list(write_jpegs(tmp_path / "jpegs", (100, 80), 24, quality=90, seed=0))
    found = readers(tmp_path / "jpegs", tmp_path / "shards", CONDITIONS, quality=90)
    assert list(found) == NAMES
    moments = {}
    for name in BATCHED:
        reader = found[name]
        passes = [torch.cat(list(reader.read())) for _ in range(8)]
        assert all(images.shape == (len(files), 3, 32, 48) for images in passes)
        assert all(images.dtype == torch.float32 for images in passes)
        assert len({float(images.sum()) for images in passes}) == len(passes)  # other crops every time
        images = torch.cat(passes)
        texture = images.diff(dim=3).abs().mean()  # falls with the share of the picture that a crop takes
        moments[name] = torch.stack([*images.mean((0, 2, 3)), *images.std((0, 2, 3)), texture])
    for name in BATCHED[1:]:
        torch.testing.assert_close(moments[name], moments[BASELINE], rtol=0.1, atol=0.05)


def test_the_report_is_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    done: list[tuple[str, int]] = []
    report = run_pictures(
        CONDITIONS, lambda *told: done.append(told), quality=85, sizes=[(60, 40), (90, 80)], at_least=3
    )["pictures"]
    assert torch.get_num_threads() == threads
    assert not list(tmp_path.iterdir())
    assert torch.equal(torch.get_rng_state(), state)
    assert {"china", "flower"} <= set(report["photographs"])
    assert list(report["libraries"]) == ["torchvision", "Pillow"]
    assert list(report["sizes"]) == ["60x40", "90x80"]
    for size, found in report["sizes"].items():
        assert found["pictures"] == 4  # whole batches
        assert list(found["variants"]) == NAMES
        base = found["variants"][BASELINE]["median_ms"]
        for name, row in found["variants"].items():
            assert len(row["seconds"]) == 3
            assert row["median_ms"] == pytest.approx(sorted(row["seconds"])[1] / 4 * 1e3)
            assert row["per_second"] == pytest.approx(1e3 / row["median_ms"])
            assert row["speed"] == pytest.approx(base / row["median_ms"])
            assert (row["normalizing"] is None) == (name in (BASELINE, FLOOR))
            share = row["normalizing"] or 0
            assert 0 <= share < 1
            assert row["speed_without"] == pytest.approx(row["speed"] / (1 - share))
            assert done.count((f"{size}: {name}", 4)) == 4  # three passes and one to warm up
        assert done.count((f"writing {size}", 4)) == 4
    assert report["sizes"]["60x40"]["bytes"] < report["sizes"]["90x80"]["bytes"]


def test_the_table_shows_the_report() -> None:
    row = {"seconds": [1.0], "median_ms": 4.0, "quartiles_ms": [3.9, 4.1], "per_second": 250.0, "normalizing": None}
    row["speed_without"] = 1.0
    ours = {**row, "median_ms": 2.0, "quartiles_ms": [2.0, 2.5], "per_second": 500.0, "normalizing": 0.125}
    variants = {BASELINE: {**row, "speed": 1.0}, "folder": {**ours, "speed": 2.0, "speed_without": 2.29}}
    found = {"pictures": 64, "bytes": 55123, "variants": variants}
    report = {
        "pictures": {"libraries": {"torchvision": "1.2", "Pillow": "3"}, "quality": 75, "sizes": {"500x375": found}}
    }
    console = Console(width=120, record=True, file=io.StringIO())
    for table in picture_tables(report):
        console.print(table)
    shown = console.export_text()
    assert "64 JPEGs of 500x375, quality 75, 55 kB" in shown
    assert lines_of(shown, BASELINE)[0] == ["4.00", "5.0%", "1.00", "250"]
    assert lines_of(shown, "folder")[0] == ["2.00", "25.0%", "2.00", "12.5%", "2.29", "500"]
    assert "speed / torchvision 1.2 (ImageFolder, RandomResizedCrop, ... on PIL 3)" in " ".join(shown.split())
    assert not list(picture_tables({"what": "step"}))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    small = functools.partial(run_pictures, sizes=[(60, 40)], at_least=2)
    monkeypatch.setattr("fcmae.bench.run_pictures", small)
    path = tmp_path / "out.json"
    bench(compose("what=pictures", f"json={path}", "repeats=1", "warmup=0"))
    report: dict[str, Any] = json.loads(path.read_text())
    assert report["what"] == "pictures"
    assert "variants" not in report
    shown = capsys.readouterr().out
    for name, row in report["pictures"]["sizes"]["60x40"]["variants"].items():
        assert lines_of(shown, name)[0][0] == f"{row['median_ms']:.2f}"
    with pytest.raises(UserError, match=r"plot=out\.png shows steps, not what=pictures"):
        bench(compose("what=pictures", "plot=out.png"))


def test_the_floor_reads_every_file_at_an_eighth_of_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list(write_jpegs(tmp_path, (160, 80), 4, quality=90, seed=0))
    sizes: list[tuple[int, int]] = []
    load = JpegImageFile.load
    monkeypatch.setattr(JpegImageFile, "load", lambda self: (load(self), sizes.append(self.size)))
    assert not list(FloorReader(tmp_path).read())
    assert sizes == [(20, 10)] * 4


def test_better_quality_makes_larger_files(tmp_path: Path) -> None:
    small, large = (
        sum(file.stat().st_size for file in write_jpegs(tmp_path / str(quality), (160, 80), 4, quality=quality, seed=0))
        for quality in (75, 90)
    )
    assert 1.3 * small < large


@pytest.mark.parametrize("quality", [0, 101, 90.0, None])
def test_a_quality_that_jpegs_do_not_have_is_refused(quality: object) -> None:
    with pytest.raises(UserError, match=rf"quality={quality} must be a whole number from 1 to 100"):
        bench(compose("what=pictures", f"quality={'null' if quality is None else quality}"))
