"""The probe beside pre-training: it changes nothing, says what `evaluate` says, and chooses the best checkpoint."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from micro import MICRO, RUN, command, pretrain
from PIL import Image

from fcmae.checkpoints.weights import read_weights
from fcmae.training.callbacks.online_probe import OnlineProbe

SHORT = [*MICRO, "epochs=3", "save.every_n_steps=1", "save.keep=99", "trainer.limit_train_batches=2"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise on one of three greys, so that a few are mistaken."""
    folder, numbers = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 10)):
        for grey, name in ((70, "dark"), (85, "middle"), (100, "light")):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = numbers.normal(grey + numbers.normal(0, 8), 60, (40, 40)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{index}.png")
    return folder


def run(place: Path, *options: str) -> list[dict[str, Any]]:
    """The lines of the log with a score."""
    result = pretrain(place, *SHORT, *options)
    assert result.code == 0, result.err
    text = (place / RUN / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]  # no bare NaN
    return [line for line in lines if any(name.startswith("val_") and "acc1" in name for name in line)]


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_the_probe_changes_nothing(kind: str, labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    probe = [f"probe.data={labelled}", f"probe.kind={kind}", "probe.every_n_epochs=1", "probe.stages=[2,4]"]
    assert len(run(tmp_path / "with", *probe)) == 3
    assert run(tmp_path / "without") == []
    files = [tmp_path / name / RUN / "checkpoints/last.ckpt" for name in ("with", "without")]
    one, other = (torch.load(file, weights_only=True)["state_dict"] for file in files)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_it_comes_as_often_as_asked_and_at_the_end(labelled: Path, tmp_path: Path) -> None:
    scores = run(tmp_path, f"probe.data={labelled}", "probe.every_n_epochs=2")
    assert [line["step"] for line in scores] == [4, 6]


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_the_best_checkpoint_has_the_best_score_and_evaluate_agrees(kind: str, labelled: Path, tmp_path: Path) -> None:
    options = [f"probe.data={labelled}", f"probe.kind={kind}", "probe.every_n_epochs=1", "optim.base_lr=0.3"]
    scores = {line["step"]: line[f"val_{kind}_acc1"] for line in run(tmp_path, *options)}
    best = torch.load(tmp_path / RUN / "checkpoints/best.ckpt", weights_only=True)
    step = max(scores, key=lambda step: (scores[step], -step))  # the first of equals
    assert best["fcmae"]["best"] == {"metric": f"val_{kind}_acc1", "value": pytest.approx(scores[step]), "step": step}
    saved = next((tmp_path / RUN / "checkpoints").glob(f"*step={step:08d}.ckpt"))
    weights = torch.load(saved, weights_only=True)["state_dict"]
    assert all(torch.equal(best["state_dict"][name], weights[name]) for name in weights)
    assert 1 / 3 < scores[step] < 1

    options = [f"checkpoint={RUN}/checkpoints/best.ckpt", f"data.path={labelled}", "num_workers=0", "device=cpu"]
    result = command("evaluate", tmp_path, *options, f"probe={kind}", "knn.k=[20]", "out=evaluated")
    assert result.code == 0, result.err
    metrics = json.loads((tmp_path / "evaluated/metrics.json").read_text())
    assert metrics["acc1"] == pytest.approx(scores[step], abs=1e-6)


def test_a_score_that_is_not_finite_is_never_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([float("nan"), 0.25, float("inf")])
    monkeypatch.setattr(OnlineProbe, "score", lambda self, module: next(scores))
    logged = run(tmp_path, "probe.data=digits", "probe.every_n_epochs=1")
    assert [line["val_knn_acc1"] for line in logged] == [None, 0.25, None]
    best = read_weights(tmp_path / RUN / "checkpoints/best.ckpt").description
    assert best is not None
    assert best["best"] == {"metric": "val_knn_acc1", "value": 0.25, "step": 4}
    text = (tmp_path / RUN / "summary.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["val_knn_acc1"] is None
    told = [line for line in (tmp_path / RUN / "train.log").read_text().splitlines() if "WARNING" in line]
    assert [line.partition("val_knn_acc1 ")[2] for line in told] == [
        "is nan after step 2: not taken for the best",
        "is inf after step 6: not taken for the best",
    ]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("probe.data=nowhere", "nowhere does not exist: name a folder of images"),
        ("probe.kind=svm", "probe.kind='svm' is unknown: use knn or linear"),
        ("probe.every_n_epochs=0", "probe.every_n_epochs=0 must be a whole number from 1"),
        ("probe.stages=[0]", "stages=[0] must be some of [1, 2, 3, 4], each once, or null"),
    ],
)
def test_bad_input(option: str, message: str, tmp_path: Path) -> None:
    assert pretrain(tmp_path, *MICRO, "probe.data=digits", option).only_error == message
    assert not list(tmp_path.iterdir())
