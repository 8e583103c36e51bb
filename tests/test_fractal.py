"""Fractals as labelled images: what is drawn, that it is the same every time, and that its classes can be told."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import MICRO, pretrain
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from fcmae import UserError
from fcmae.data import fractal
from fcmae.data.fractal import FractalDataModule, Fractals, class_system
from fcmae.data.transforms import Crop

ROOT = Path(__file__).parents[1]
YAML: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "data" / "fractal.yaml").read_text())


def data(**options: Any) -> FractalDataModule:
    given = {key: value for key, value in YAML.items() if key != "_target_"}
    given |= {"augment": Crop(crop_scale=[0.2, 1.0], flip=True), "seed": 0, "num_workers": 0, "image_size": 32}
    return FractalDataModule(**{**given, "classes": 5, "images_per_class": 8, "batch_size": 4, **options})


def fractals(**options: Any) -> Fractals:
    return Fractals(**{"classes": 10, "images_per_class": 20, "size": (32, 32), "in_chans": 3, **options})


def pixels(source: Fractals, index: int) -> np.ndarray:
    return source.open(index).decode().numpy()


# -- systems --


@given(label=st.integers(0, 2**40))
@settings(max_examples=200, deadline=None)
def test_systems_are_contractions_with_the_published_sum_of_singular_values(label):
    system = class_system(label)
    maps = len(system)
    assert 2 <= maps <= 8
    assert system.shape == (maps, 2, 3)
    assert np.array_equal(system, class_system(label))
    values = np.linalg.svd(system[:, :, :2], compute_uv=False)
    assert values.max() <= 1 + 1e-9
    assert (5 + maps) / 2 - 1e-9 <= (values * [1, 2]).sum() <= (6 + maps) / 2 + 1e-9
    assert np.abs(system[:, :, 2]).max() <= 1


def test_every_number_of_maps_and_both_hands_occur():
    systems = [class_system(label) for label in range(200)]
    assert {len(system) for system in systems} == set(range(2, 9))
    mirrored = np.concatenate([np.linalg.det(system[:, :, :2]) < 0 for system in systems])
    assert 0.4 < mirrored.mean() < 0.6


def test_the_points_are_those_that_the_maps_leave_as_they_are():
    """Sierpinski's triangle: three maps that halve; no point of it is in the triangle between the halves."""
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    system = np.concatenate([np.tile(np.eye(2) / 2, (3, 1, 1)), corners[:, :, None] / 2], axis=2)
    x, y = fractal._points(system, 20000, np.random.default_rng(0))
    assert x.shape == y.shape
    assert len(x) >= 20000
    slack = 2 ** -(fractal._SETTLING - 1)  # from the point that all begin with
    assert min(x.min(), y.min(), (1 - x - y).min()) >= -slack
    inner = (x < 0.5 - slack) & (y < 0.5 - slack) & (x + y > 0.5 + slack)
    assert not inner.any()
    shares = [np.mean(part) for part in ((x > 0.5), (y > 0.5), (x + y < 0.5))]
    assert np.allclose(shares, 1 / 3, atol=0.02)  # of equal size, of equal weight
    cells = {(int(16 * a), int(16 * b)) for a, b in zip(x, y, strict=True)}
    assert len({(a, b) for a, b in cells if a & b == 0}) == 3**4  # all of it is reached


# -- pictures --


@pytest.mark.parametrize("size", [(32, 32), (96, 160), (64, 32)])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_pictures_have_the_size_and_are_the_same_every_time(size, in_chans):
    source = fractals(size=size, in_chans=in_chans)
    for index in (0, 57, 199):
        found = source.open(index).decode()
        assert found.shape == (in_chans, *size)
        assert found.dtype == torch.uint8
        assert source.open(index).size == size
        assert torch.equal(found, fractals(size=size, in_chans=in_chans).open(index).decode())


def test_a_picture_depends_on_its_class_and_number_alone():
    few, many = fractals(), fractals(classes=1000, images_per_class=500)
    assert np.array_equal(pixels(few, 3 * 20 + 7), pixels(many, 3 * 500 + 7))
    assert few.sample_id(3 * 20 + 7) == many.sample_id(3 * 500 + 7) == "fractal/3/7"
    pictures = {pixels(few, index).tobytes() for index in range(len(few))}
    assert len(pictures) == len(few) == 200


def test_other_versions_and_machines_draw_the_same():
    """The picture of the documentation; single pixels may differ, as floating point does."""
    block = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "fractal.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(block) == 1
    assert "nrow=6" in block[0]
    committed = np.asarray(Image.open(ROOT / "docs" / "images" / "fractal.png")).astype(int)
    assert committed.shape == (8 * 98 + 2, 6 * 98 + 2, 3)
    source = fractals(classes=8, images_per_class=6, size=(96, 96))
    for index in range(48):
        top, left = (2 + 98 * place for place in divmod(index, 6))
        there = committed[top : top + 96, left : left + 96].transpose(2, 0, 1)
        differing = (np.abs(there - pixels(source, index)) > 2).any(0).mean()
        assert differing < 0.02, source.sample_id(index)


def test_no_picture_is_blank():
    """Of 300 classes; a covered share p and a distance of 40 make a deviation of at least 40 sqrt(p (1 - p))."""
    for size, images in (((64, 64), 3), ((224, 224), 1)):
        source = fractals(classes=300, images_per_class=images, size=size, in_chans=1)
        for index in range(len(source)):
            picture = pixels(source, index)[0].astype(float)
            light = (picture >= 140).mean()  # fractal or background: no shade of either is between 100 and 140
            assert 0.04 < light < 0.96, source.sample_id(index)
            assert not ((picture > 100) & (picture < 140)).any()
            assert picture.std() > 40 * np.sqrt(0.04 * 0.96), source.sample_id(index)


@pytest.mark.parametrize("attempts", [0, 1])
def test_a_class_that_cannot_be_seen_is_drawn_anew(attempts, monkeypatch):
    wanted = class_system(4)
    draw, seen = fractal._draw, []

    def blank_at_first(*args: Any) -> np.ndarray:
        seen.append(args[0])
        return np.zeros((64, 64), dtype=int) if len(seen) <= attempts else draw(*args)

    monkeypatch.setattr(fractal, "_draw", blank_at_first)
    assert np.array_equal(class_system(4), wanted) == (attempts == 0)
    assert len(seen) == attempts + 1


def test_a_view_that_shows_nothing_gives_way_to_the_whole_class(monkeypatch):
    system, draw, views = class_system(4), fractal._draw, []

    def only_without_a_view(system: np.ndarray, size: Any, generator: Any, *view: Any) -> np.ndarray:
        views.append(bool(view))
        return np.zeros(size, dtype=int) if view else draw(system, size, generator)

    monkeypatch.setattr(fractal, "_draw", only_without_a_view)
    assert (fractal._draw_some(system, (64, 64), np.random.default_rng(0)) > 0).mean() > 0.1
    assert views == [True] * 4 + [False]


def test_grey_is_the_brightness_of_the_colours():
    grey, colours = (fractals(in_chans=channels, size=(64, 64)) for channels in (1, 3))
    for index in range(0, 200, 10):
        luma = np.tensordot([0.299, 0.587, 0.114], pixels(colours, index).astype(float), 1)
        unclipped = (pixels(colours, index) > 0).all(0) & (pixels(colours, index) < 255).all(0)
        assert np.abs(luma - pixels(grey, index)[0])[unclipped].max() < 2


def test_colours_and_backgrounds_vary():
    pictures = np.stack([pixels(fractals(), index) for index in range(60)])
    means = pictures.mean((2, 3))  # (60, 3)
    assert means.std(0).min() > 15
    assert np.ptp(pictures.reshape(60, 3, -1), axis=2).mean() > 100
    assert 15 < sum(picture[0].mean() > 127 for picture in pictures) < 45  # light on dark, and dark on light


# -- as labelled images --


def test_labels_and_names():
    source = fractals(classes=3, images_per_class=2)
    assert source.class_names == ["fractal-00000", "fractal-00001", "fractal-00002"]
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert source.labels.dtype == torch.int64
    assert source.held_out is None
    assert len(source) == 6


def test_the_classes_can_be_told_from_raw_pixels():
    source = fractals(images_per_class=220, in_chans=1)
    pictures = np.stack([pixels(source, index).ravel() for index in range(len(source))]).astype(float)
    pictures = (pictures - pictures.mean(1, keepdims=True)) / pictures.std(1, keepdims=True)
    held_out = np.arange(len(source)) % 220 >= 200
    labels = source.labels.numpy()
    neighbours = KNeighborsClassifier(5).fit(pictures[~held_out], labels[~held_out])
    assert neighbours.score(pictures[held_out], labels[held_out]) > 0.4  # by chance 0.1, four deviations are 0.085


def test_batches():
    module = data()
    train, held_out = module.split()
    assert (len(train), len(held_out)) == (32, 8)
    (batch, *_) = module.train_dataloader()
    assert batch.images.shape == (4, 3, 32, 32)
    assert batch.broken == []
    assert [f"fractal-{int(name.split('/')[1]):05d}" for name in batch.sample_ids] == [
        module.class_names[label] for label in batch.labels
    ]
    assert data(shots=2).train_labels().bincount().tolist() == [2] * 5


def test_the_fingerprint_changes_with_the_number_of_images():
    prints = {data(**more).fingerprint() for more in ({}, {"classes": 6}, {"images_per_class": 9})}
    assert len(prints) == 3
    assert data(seed=3).fingerprint() in prints


def test_it_can_be_sent_to_workers_that_are_spawned():
    source = fractals()
    source.open(0)
    assert np.array_equal(pixels(pickle.loads(pickle.dumps(source)), 21), pixels(source, 21))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 0}, "data.classes=0 must be at least 1"),
        ({"images_per_class": -3}, "data.images_per_class=-3 must be at least 1"),
        ({"in_chans": 4}, "data.in_chans=4: fractals are drawn in grey or in colours, use 1 or 3"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        fractals(**options)


def test_a_run_on_fractals(tmp_path):
    options = ["data=fractal", "data.classes=4", "data.images_per_class=10", "data.num_workers=0", "epochs=1"]
    result = pretrain(tmp_path, *MICRO, *options)
    assert result.code == 0, result.err
