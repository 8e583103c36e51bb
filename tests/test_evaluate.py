"""Where the results of an evaluation go: nothing of another one is lost."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from micro import command
from PIL import Image

from fcmae import UserError
from fcmae.command_line.launch import compose
from fcmae.command_line.result_folder import check_same, result_folder
from fcmae.evaluate import evaluate


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x"])
    for file in ("checkpoints/best.ckpt", "checkpoints/sharded.ckpt/0", "exported/model.safetensors"):
        place = tmp_path / "outputs/finetune/x" / file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"")


@pytest.mark.parametrize(
    ("checkpoint", "options", "name"),
    [
        ("", [], "finetune-x"),
        ("", ["probe=knn"], "finetune-x-knn"),
        ("", ["probe=knn", "stages=[3,4]"], "finetune-x-stages34-knn"),
        ("", ["split=all"], "finetune-x-all"),
        ("", ["split=all", "probe=linear"], "finetune-x-linear"),
        ("", ["image_size=288"], "finetune-x-288"),
        ("", ["image_size=[64,96]", "split=train"], "finetune-x-64x96-train"),
        ("/checkpoints", [], "finetune-x"),
        ("/checkpoints/best.ckpt", [], "finetune-x-best"),
        ("/checkpoints/sharded.ckpt", [], "finetune-x-sharded"),
        ("/exported/model.safetensors", ["probe=knn"], "finetune-x-model-knn"),
    ],
)
def test_results_are_named_after_what_they_are_of(checkpoint: str, options: list[str], name: str) -> None:
    config = compose("evaluate", [f"checkpoint=outputs/finetune/x{checkpoint}", "data.path=y", *options])
    assert result_folder(config) == Path("outputs/evaluate", name)


def test_a_folder_that_is_given_is_taken() -> None:
    assert result_folder(compose("evaluate", ["checkpoint=x", "data.path=y", "out=z", "split=all"])) == Path("z")


WHAT: dict[str, Any] = {
    "checkpoint": "a",
    "data": {"path": "y", "val_path": "z", "shots": None},
    "split": "val",
    "classes": "by_name",
}


def test_results_of_the_same_evaluation_are_written_anew(tmp_path: Path) -> None:
    check_same(tmp_path, WHAT)  # nothing there
    for text in ("{", "[]", "null"):  # nothing that can be read
        (tmp_path / "about.json").write_text(text)
        check_same(tmp_path, WHAT)
    (tmp_path / "about.json").write_text(json.dumps({**WHAT, "skipped": []}))
    check_same(tmp_path, WHAT)
    check_same(tmp_path, {**WHAT, "checkpoint": str(tmp_path / "a")})  # where one is
    check_same(tmp_path, {**WHAT, "data": {**WHAT["data"], "path": str(tmp_path / "y")}})
    (tmp_path / "about.json").write_text(json.dumps({"checkpoint": "a", "data": {"path": "y"}}))  # says less
    check_same(tmp_path, WHAT)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"data": {**WHAT["data"], "path": "x"}}, "data.path: y, now x"),
        ({"data": {**WHAT["data"], "shots": 3}}, "data.shots: None, now 3"),
        ({"checkpoint": "b"}, "checkpoint: a, now b"),
        ({"split": "all"}, "split: val, now all"),
        ({"classes": "by_order"}, "classes: by_name, now by_order"),
    ],
)
def test_results_of_another_evaluation_are_not_written_over(changed: dict[str, Any], told: str, tmp_path: Path) -> None:
    (tmp_path / "about.json").write_text(json.dumps(WHAT))
    with pytest.raises(UserError) as caught:
        check_same(tmp_path, {**WHAT, **changed})
    assert str(caught.value) == f"{tmp_path} holds the results of another evaluation ({told}): name a folder, out=DIR"


def test_the_folder_of_a_run_is_refused(tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "outputs/finetune/x", tmp_path / "run")
    with pytest.raises(UserError, match="out=run is the folder of a run: name another"):
        evaluate(compose("evaluate", ["checkpoint=outputs/finetune/x", "data.path=y", "out=run"]))


@pytest.fixture
def several_labels(tmp_path: Path) -> Path:
    """A folder with images of any number of classes, a table of them, and a network fine-tuned on them for a step."""
    rows = ["image,label,split"]
    for number in range(24):
        Image.effect_noise((40, 40), 80).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{('cat', 'dog', 'cat; dog', '')[number % 4]},{'val' if number > 15 else 'train'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    model = ["+model=custom", "model.depths=[1,1,1,1]", "model.dims=[8,16,32,64]", "data.image_size=64"]
    short = ["data.batch_size=8", "data.num_workers=0", "epochs=1", "optim.warmup_epochs=0", "trainer=cpu"]
    several = [
        "data.multi_label=true",
        "label_smoothing=0",
        "batch_augment=none",
        "run_name=several",
        "checkpoint=null",
    ]
    result = command("finetune", tmp_path, *model, *short, *several, *TABLE)
    assert result.code == 0, result.err
    return tmp_path


TABLE = ["data=table", "data.path=.", "data.table=labels.csv"]


def test_a_checkpoint_knows_that_images_have_several_labels(several_labels: Path) -> None:
    options = ["checkpoint=outputs/finetune/several", *TABLE, "device=cpu", "num_workers=0"]
    result = command("evaluate", several_labels, *options)
    assert result.code == 0, result.err
    assert "mean average precision" in result.out
    out = several_labels / "outputs/evaluate/finetune-several"
    assert json.loads((out / "about.json").read_text())["data"]["multi_label"] is True
    assert command("evaluate", several_labels, *options, "data.multi_label=true").code == 0  # the same evaluation
    typed = command("evaluate", several_labels, *options, "data.multi_label=false", "out=typed")
    assert "add data.multi_label=true" in typed.error
    probed = command("evaluate", several_labels, *options, "probe=linear")  # of whatever labels
    assert "add data.multi_label=true" in probed.error
