"""Which images a classifier is judged by, and what its classes are called there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from micro import command
from test_labelled import OPTIONS, folders, write

from fcmae import UserError
from fcmae.checkpoints.weights import Weights
from fcmae.data.preparation import Preparation
from fcmae.data.table import TableDataModule
from fcmae.inference.ground_truth import indices_of, labels_for
from fcmae.inference.trained import Trained

PREPARATION = Preparation(image_size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct="auto")


def trained(names: list[str], description: dict[str, Any] | None, *, several: bool = False) -> Trained:
    source = Weights(weights={}, file=Path("x.ckpt"), kind="x", average=False, description=description)
    return Trained(
        net=torch.nn.Identity(),  # type: ignore[arg-type]
        source=source,
        preparation=PREPARATION,
        class_names=tuple(names),
        multi_label=several,
    )


@pytest.fixture
def many(tmp_path: Path) -> Path:
    write(tmp_path, *[f"{name}/{number}.png" for name in "ab" for number in range(12)])
    return tmp_path


def described(root: Path, val_images: int) -> dict[str, Any]:
    return {
        "format": 1,
        "recipe": {"data": {"val_images": val_images}},
        "steps": {"data": folders(root).fingerprint()},
        "class_names": ["a", "b"],
    }


@pytest.mark.parametrize("held_out", [1, 2, 4])
def test_a_classifier_is_judged_by_the_images_its_run_held_out(held_out: int, many: Path, caplog: Any) -> None:
    said = described(many, held_out)
    wanted = folders(many, val_images=held_out).split()
    assert len(wanted[1]) == held_out
    for split, part in (("val", wanted[1]), ("train", wanted[0])):
        data = folders(many, val_images=512)
        assert list(indices_of(split, data, trained(["a", "b"], said))) == list(part)
    assert not caplog.records


def test_other_images_are_said_to_be_other_ones(many: Path, caplog: Any) -> None:
    said = described(many, 1)
    write(many, "a/new.png")
    data = folders(many, val_images=2)
    assert len(indices_of("val", data, trained(["a", "b"], said))) == 2
    (record,) = caplog.records
    assert "x.ckpt was trained on other images than these, or they have changed since" in record.getMessage()
    caplog.clear()
    for split, count in (("train", 23), ("all", 25)):
        assert len(indices_of(split, folders(many, val_images=2), trained(["a", "b"], said))) == count
    assert not caplog.records


def test_weights_of_others_have_held_nothing_out(many: Path, caplog: Any) -> None:
    assert len(indices_of("val", folders(many, val_images=2), trained(["a", "b"], None))) == 2
    assert not caplog.records


def test_a_part_of_its_own_is_taken_whole(tmp_path: Path, caplog: Any) -> None:
    write(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png")
    data = folders(tmp_path)
    found = [data.source.sample_id(index) for index in indices_of("val", data, trained(["a", "b"], {}))]
    assert found == ["val/a/3.png", "val/b/4.png"]
    assert not caplog.records


@pytest.mark.parametrize("description", [None, {}, {"input": {"image_size": 224}}, {"class_names": []}])
def test_a_classifier_that_names_no_class_takes_the_datas_order(description: Any, many: Path, caplog: Any) -> None:
    data = folders(many)
    assert torch.equal(labels_for(trained(["0", "1"], description), data, by_order=False), data.labels)
    assert "x.ckpt does not name its classes: they are taken in the order of the data's" in caplog.text


def test_classes_of_other_names_are_taken_in_order_only_if_asked_for(many: Path, caplog: Any) -> None:
    data, theirs = folders(many), trained(["tench", "shark"], {"class_names": ["tench", "shark"]})
    with pytest.raises(UserError, match=r"class 'a' of the data is none of the 2 .* or give classes=by_order if"):
        labels_for(theirs, data, by_order=False)
    assert torch.equal(labels_for(theirs, data, by_order=True), data.labels)
    assert "x.ckpt calls them 'tench' to 'shark': they are taken in the order of the data's" in caplog.text


def test_an_order_of_other_length_is_none(many: Path) -> None:
    theirs = trained(["x", "y", "z"], {"class_names": ["x", "y", "z"]})
    with pytest.raises(UserError, match=r"classes=by_order: x\.ckpt knows 3 classes, the data has 2; leave the option"):
        labels_for(theirs, folders(many), by_order=True)
    with pytest.raises(UserError, match=r"none of the 3 that x\.ckpt knows [^:]*: rename or leave out its images$"):
        labels_for(theirs, folders(many), by_order=False)


def test_classes_are_matched_by_name(many: Path) -> None:
    data = folders(many)
    found = labels_for(trained(["c", "b", "a"], {"class_names": ["c", "b", "a"]}), data, by_order=False)
    assert torch.equal(found, 2 - data.labels)


def test_several_labels_are_matched_by_name(tmp_path: Path) -> None:
    write(tmp_path, "1.png", "2.png")
    (tmp_path / "t.csv").write_text("image,label\n1.png,a;b\n2.png,b\n")
    data = TableDataModule(path=str(tmp_path), table=str(tmp_path / "t.csv"), multi_label=True, **OPTIONS)
    theirs = trained(["b", "c", "a"], {"class_names": ["b", "c", "a"]}, several=True)
    assert labels_for(theirs, data, by_order=False).tolist() == [[True, False, True], [True, False, False]]
    with pytest.raises(UserError, match=r"x\.ckpt knows one label per image, the data has several labels per image"):
        labels_for(trained(["a", "b"], {}), data, by_order=False)


def test_an_unknown_way_to_match_is_refused(tmp_path: Path) -> None:
    error = command("evaluate", tmp_path, "checkpoint=x", "data.path=x", "classes=guess").only_error
    assert error.startswith("classes='guess' is unknown: use by_name or by_order")
