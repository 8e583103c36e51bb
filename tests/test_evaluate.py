"""Where the results of an evaluation go: nothing of another one is lost."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from fcmae import UserError
from fcmae.evaluate import _check_same, _out, evaluate
from fcmae.launch import compose


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
    assert _out(config) == Path("outputs/evaluate", name)


def test_a_folder_that_is_given_is_taken() -> None:
    assert _out(compose("evaluate", ["checkpoint=x", "data.path=y", "out=z", "split=all"])) == Path("z")


def test_results_of_another_evaluation_are_not_written_over(tmp_path: Path) -> None:
    what = {"checkpoint": "a", "data": {"path": "y"}, "split": "val"}
    _check_same(tmp_path, what)  # nothing there
    (tmp_path / "about.json").write_text("{")
    _check_same(tmp_path, what)  # nothing that can be read
    (tmp_path / "about.json").write_text(json.dumps({**what, "skipped": []}))
    _check_same(tmp_path, what)
    with pytest.raises(
        UserError,
        match=r"holds the results of another evaluation \(data: {'path': 'y'}, now {'path': 'z'}\): name a folder",
    ):
        _check_same(tmp_path, {**what, "data": {"path": "z"}})


def test_the_folder_of_a_run_is_refused(tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "outputs/finetune/x", tmp_path / "run")
    with pytest.raises(UserError, match="out=run is the folder of a run: name another"):
        evaluate(compose("evaluate", ["checkpoint=outputs/finetune/x", "data.path=y", "out=run"]))
