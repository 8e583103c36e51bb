"""Numbers, tables and the picture of a classifier, against scikit-learn's and formulas by hand."""

import csv
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.special import log_expit, log_softmax, softmax
from sklearn import metrics as reference
from torch import Tensor

from fcmae.errors import UserError
from fcmae.evaluation.classification import ClassificationMetrics, average_precision
from fcmae.evaluation.classification_report import ClassificationReport

SCORES = ("precision", "recall", "f1")
DARKEST = (8, 48, 107)  # of matplotlib's Blues: a share of 1


def gather(logits: Tensor, labels: Tensor, pieces: list[int] | None = None) -> ClassificationMetrics:
    """What is gathered from a data set that comes in batches of these sizes."""
    metrics = ClassificationMetrics(logits.shape[1], multi_label=labels.ndim == 2)
    sizes = pieces or [len(logits)]
    for some_logits, some_labels in zip(logits.split(sizes), labels.split(sizes), strict=True):
        metrics.update(some_logits, some_labels)
    return metrics


def report_on(logits: Tensor, labels: Tensor, pieces: list[int] | None = None) -> ClassificationReport:
    return gather(logits, labels, pieces).compute([str(index) for index in range(logits.shape[1])])


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Guo et al. 2017, equation 3."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins, total = np.minimum((confidence * 15).astype(int), 14), 0.0
    for number in range(15):
        inside = bins == number
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    classes=st.integers(2, 9),
    pieces=st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any),
    sharpness=st.floats(0.1, 30),
    hidden=st.floats(0, 0.9),
)
def test_one_class_per_image_as_in_sklearn(seed, classes, pieces, sharpness, hidden) -> None:
    random = np.random.default_rng(seed)
    logits = sharpness * random.normal(size=(sum(pieces), classes))
    labels = random.integers(0, classes, len(logits))
    seen = random.random(len(logits)) >= hidden
    seen[0] = True
    report = report_on(torch.tensor(logits), torch.tensor(np.where(seen, labels, -1)), pieces)
    logits, labels = logits[seen], labels[seen]
    predictions, every = logits.argmax(1), list(range(classes))

    assert report.images == len(labels)
    assert report.metrics["loss"] == pytest.approx(
        -log_softmax(logits, axis=1)[range(len(labels)), labels].mean(), rel=1e-5
    )
    assert report.metrics["acc1"] == pytest.approx(reference.accuracy_score(labels, predictions))
    recall = reference.recall_score(labels, predictions, labels=np.unique(labels), average="macro", zero_division=0)
    assert report.metrics["balanced_accuracy"] == pytest.approx(recall)
    assert report.metrics["ece"] == pytest.approx(calibration_error(softmax(logits, axis=1), labels), abs=1e-6)
    assert ("acc5" in report.metrics) == (classes > 5)
    if classes > 5:
        expected = reference.top_k_accuracy_score(labels, logits, k=5, labels=every)
        assert report.metrics["acc5"] == pytest.approx(expected)
    np.testing.assert_array_equal(report.confusion, reference.confusion_matrix(labels, predictions, labels=every))
    *scores, support = reference.precision_recall_fscore_support(
        labels, predictions, labels=every, zero_division=np.nan
    )
    assert report.per_class["images"] == support.tolist()
    for name, values in zip(SCORES, scores, strict=True):
        np.testing.assert_allclose(report.per_class[name], values, rtol=1e-12)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    classes=st.integers(1, 7),
    pieces=st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any),
    sharpness=st.sampled_from([0.1, 1, 20]),
    share=st.floats(0, 1),
    ties=st.booleans(),
)
def test_several_classes_per_image_as_in_sklearn(seed, classes, pieces, sharpness, share, ties) -> None:
    random = np.random.default_rng(seed)
    logits = sharpness * random.normal(size=(sum(pieces), classes))
    logits = logits.round(1 if ties else 15)
    labels = random.random(logits.shape) < share
    report = report_on(torch.tensor(logits), torch.tensor(labels), pieces)
    predictions, there = logits > 0, labels.any(0)

    assert report.images == len(labels)
    loss = -log_expit(np.where(labels, logits, -logits)).mean()
    assert report.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    expected = [
        reference.average_precision_score(labels[:, c], logits[:, c]) if there[c] else np.nan for c in range(classes)
    ]
    np.testing.assert_allclose(report.per_class["average_precision"], expected, rtol=1e-6)
    np.testing.assert_allclose(average_precision(torch.tensor(logits), torch.tensor(labels)), expected, rtol=1e-6)
    np.testing.assert_allclose(report.metrics["map"], np.nanmean(expected) if there.any() else np.nan, rtol=1e-6)
    counts = {"tp": predictions & labels, "fp": predictions & ~labels, "fn": ~predictions & labels}
    tp, fp, fn = (counts[name].sum(0) for name in ("tp", "fp", "fn"))
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing
        f1 = 2 * tp / (2 * tp + fp + fn)
        assert report.per_class["images"] == labels.sum(0).tolist()
        np.testing.assert_allclose(report.per_class["precision"], tp / (tp + fp), rtol=1e-12)
        np.testing.assert_allclose(report.per_class["recall"], tp / (tp + fn), rtol=1e-12)
        np.testing.assert_allclose(report.per_class["f1"], f1, rtol=1e-12)
        np.testing.assert_allclose(report.metrics["f1_macro"], np.nanmean(f1), rtol=1e-12)
        micro = 2 * tp.sum() / (2 * tp + fp + fn).sum()
        np.testing.assert_allclose(report.metrics["f1_micro"], micro, rtol=1e-12)
    if classes > 1 and not np.isnan(f1).any():
        for kind in ("micro", "macro"):
            assert report.metrics[f"f1_{kind}"] == pytest.approx(reference.f1_score(labels, predictions, average=kind))


def test_confident_predictions_share_the_last_bin() -> None:
    # Wrong with a confidence of exactly 1, right with one of 0.95: together half are right, with 0.975.
    logits = torch.tensor([[200.0, 0.0], [np.log(0.95 / 0.05), 0.0]])
    assert report_on(logits, torch.tensor([1, 0])).metrics["ece"] == pytest.approx(0.975 - 0.5, abs=1e-6)


def test_logits_that_look_like_probabilities_are_none() -> None:
    logits, labels = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]]), torch.tensor([0, 1, 1])
    expected = calibration_error(softmax(logits.double().numpy(), axis=1), labels.numpy())
    assert report_on(logits, labels, [1, 2]).metrics["ece"] == pytest.approx(expected, abs=1e-6)
    # The first batch alone lies in 0 to 1; beside the sigmoids of the others, 0.55 would come after 0.574, of 0.3.
    logits, labels = torch.tensor([[0.55], [0.3], [-2.0]]), torch.tensor([[0], [1], [0]])
    several = report_on(torch.cat([logits, torch.tensor([[0.9]])]), torch.cat([labels, torch.tensor([[1]])]), [1, 3])
    assert several.metrics["map"] == pytest.approx((1 + 2 / 3) / 2)


def test_saturated_logits_keep_their_ranks() -> None:
    logits, labels = torch.tensor([[50.0], [400.0], [45.0], [60.0]]), torch.tensor([[0], [1], [0], [1]])
    assert report_on(logits, labels).metrics["map"] == 1


def test_low_precision_logits_are_counted_exactly() -> None:
    logits, labels = torch.randn(500, 6).bfloat16(), torch.randint(0, 6, (500,))
    assert gather(logits, labels, [100] * 5).summary() == gather(logits.double(), labels).summary()


def test_all_wrong_and_a_class_without_images() -> None:
    labels = torch.tensor([0, 0, 2, 2, 2])
    report = report_on(torch.eye(3)[(labels + 1) % 3] * 9, labels)
    assert report.metrics["acc1"] == 0
    assert report.confusion.tolist() == [[0, 2, 0], [0, 0, 0], [3, 0, 0]]
    assert report.per_class["recall"][::2] == [0, 0]
    assert np.isnan(report.per_class["recall"][1])
    assert report.per_class["f1"] == [0, 0, 0]
    assert np.isnan(report.per_class["precision"][2])


def test_balanced_accuracy_counts_every_class_that_has_images_the_same() -> None:
    labels = torch.tensor([0] * 95 + [1] * 5 + [-1])  # the last one could not be read, and of class 2 there is none
    always_the_first = torch.tensor([9.0, 0.0, 0.0]).expand(len(labels), 3)
    report = report_on(always_the_first, labels)
    assert (report.metrics["acc1"], report.metrics["balanced_accuracy"]) == (0.95, 0.5)
    assert [line.split() for line in report.lines()][3] == ["balanced", "accuracy", "50.00%"]


def test_a_diverged_model_looks_like_one(tmp_path) -> None:
    logits = torch.randn(8, 3)
    logits[2] = torch.nan
    report = report_on(logits, torch.zeros(8, dtype=torch.int64))
    assert np.isnan(report.metrics["loss"])
    report.save(tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["loss"] is None


def test_without_labels_there_is_nothing_to_report() -> None:
    metrics = gather(torch.randn(4, 7), torch.full((4,), -1))
    assert np.isnan(list(metrics.summary().values())).all()
    with pytest.raises(UserError, match="no image has a label"):
        metrics.compute([str(index) for index in range(7)])
    metrics.update(torch.eye(7)[:2], torch.tensor([0, 1]))
    assert metrics.compute([str(index) for index in range(7)]).metrics["acc1"] == 1
    assert np.isnan(list(ClassificationMetrics(3, multi_label=True).summary().values())).all()


def test_it_forgets_when_told() -> None:
    for labels in (torch.randint(0, 6, (40,)), torch.rand(40, 6) < 0.5):
        logits = torch.randn(40, 6)
        metrics = gather(logits, labels)
        metrics.summary()
        metrics.reset()
        metrics.update(logits[:9], labels[:9])
        assert metrics.summary() == gather(logits[:9], labels[:9]).summary()


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(UserError, match="1 classes are too few"):
        ClassificationMetrics(1)
    with pytest.raises(UserError, match="label 4, but the classifier has 3 classes"):
        ClassificationMetrics(3).update(torch.randn(2, 3), torch.tensor([0, 4]))


def test_tens_of_thousands_of_classes_have_no_table_of_pairs(tmp_path) -> None:
    classes = 21841
    labels = torch.randint(0, classes, (30,))
    report = report_on(torch.nn.functional.one_hot(labels, classes) * 9.0, labels)
    assert (report.metrics["acc1"], report.metrics["acc5"], report.images) == (1, 1, 30)
    assert report.confusion is None
    (tmp_path / "confusion.png").touch()
    assert report.save(tmp_path) is None
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.json", "per_class.csv"}


def gather_on_rank(rank: int, folder: str) -> None:
    """The second of two ranks gets no batch."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    summaries = []
    for several in (False, True):
        metrics = ClassificationMetrics(7, multi_label=several)
        if not rank:
            metrics.update(*some_batch(several))
        summaries.append(metrics.summary())
    Path(folder, f"{rank}.json").write_text(json.dumps(summaries))
    torch.distributed.destroy_process_group()


def some_batch(several: bool) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    labels = torch.rand(20, 7, generator=random) < 0.5 if several else torch.randint(0, 7, (20,), generator=random)
    return torch.randn(20, 7, generator=random), labels


def test_ranks_agree_even_without_a_batch(tmp_path) -> None:
    # Spawned ranks would import torch and torchmetrics again, which takes ten times as long as the test.
    torch.multiprocessing.start_processes(gather_on_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    expected = [gather(*some_batch(several)).summary() for several in (False, True)]
    for rank in range(2):
        for summary, values in zip(json.loads((tmp_path / f"{rank}.json").read_text()), expected, strict=True):
            assert summary == pytest.approx(values)


NAMES = ['tabby, or "mackerel"', "two\nlines", "nan", "$\\frac$", "über", "caf\udce9", "", "x" * 200]


@pytest.fixture
def report() -> ClassificationReport:
    """Eight classes with odd names; the sixth has no images, the fourth is always taken for the second."""
    labels = torch.tensor([0, 0, 0, 1, 2, 3, 3, 4, 6, 7])
    predictions = torch.tensor([0, 2, 1, 1, 2, 1, 1, 4, 6, 6])
    metrics = ClassificationMetrics(8)
    metrics.update(torch.eye(8)[predictions] * 5, labels)
    return metrics.compute(NAMES)


def rows_of(file: Path) -> list[list[str]]:
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.reader(opened))


def test_the_files_hold_the_numbers(report, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    assert report.save(tmp_path / "new" / "folder") is None
    folder = tmp_path / "new" / "folder"
    assert {file.name for file in folder.iterdir()} == {
        "metrics.json",
        "per_class.csv",
        "confusion.csv",
        "confusion.png",
    }
    assert json.loads((folder / "metrics.json").read_text()) == {"images": 10, **report.metrics}
    names = [name.replace("\udce9", "\\udce9") for name in NAMES]
    header, *confusion = rows_of(folder / "confusion.csv")
    assert header == ["true class", *names]
    assert [row[0] for row in confusion] == names
    assert [[int(cell) for cell in row[1:]] for row in confusion] == report.confusion.tolist()

    with (folder / "per_class.csv").open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["class"] for row in rows] == names
    assert [int(row["images"]) for row in rows] == [3, 1, 1, 2, 1, 0, 1, 1]
    assert [row["most_confused_with"] for row in rows] == [names[1], "", "", names[1], "", "", "", names[6]]
    assert [int(row["images_confused"]) for row in rows] == [1, 0, 0, 2, 0, 0, 0, 1]
    for name in SCORES:
        cells = [float(row[name] or "nan") for row in rows]
        np.testing.assert_allclose(cells, report.per_class[name], rtol=1e-5)
    assert rows[5]["recall"] == "" != rows[4]["recall"]


def test_files_for_several_classes_per_image(tmp_path) -> None:
    logits, labels = torch.randn(30, 3), torch.rand(30, 3) < 0.4
    labels[:, 1] = False
    report = report_on(logits, labels)
    assert report.save(tmp_path) is None
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.json", "per_class.csv"}
    header, *rows = rows_of(tmp_path / "per_class.csv")
    assert header == ["class", "images", "average_precision", *SCORES]
    assert rows[1][1:3] == ["0", ""]
    assert float(rows[2][2]) == pytest.approx(report.per_class["average_precision"][2], rel=1e-5)


def test_the_main_numbers_for_people(report) -> None:
    lines = report.lines()
    assert lines[0].split() == ["images", "10"]
    assert [line.split()[-1] for line in lines[2:3]] == ["50.00%"]
    assert len({len(line) for line in lines}) == 1
    several = report_on(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.tensor([[1, 0], [0, 0]])).lines()
    assert [line.split()[-1] for line in several] == ["2", "0.5633", "100.00%", "66.67%", "50.00%"]


@pytest.mark.parametrize("classes", [2, 12, 25, 200])
def test_the_picture_shows_the_shares(tmp_path, classes) -> None:
    pytest.importorskip("matplotlib")
    labels = torch.arange(classes)
    names, dark = ["y" * 60] * classes, []
    for predictions in (labels, torch.zeros_like(labels)):
        metrics = ClassificationMetrics(classes)
        metrics.update(torch.eye(classes)[predictions] * 5, labels)
        assert metrics.compute(names).save(tmp_path) is None
        with Image.open(tmp_path / "confusion.png") as image:
            pixels = np.asarray(image.convert("RGB"))
        assert 300 < min(pixels.shape[:2]) <= max(pixels.shape[:2]) < 3500
        dark.append((pixels == DARKEST).all(-1))
    without_scale = int(0.85 * dark[0].shape[1])
    rows, columns = np.nonzero(dark[0][:, :without_scale])
    assert np.corrcoef(rows, columns)[0, 1] > 0.7  # down the diagonal
    assert np.ptp(columns) > 0.4 * dark[0].shape[1]
    assert np.ptp(np.nonzero(dark[1][:, :without_scale])[1]) <= 1.1 * np.ptp(columns) / classes + 2  # one column


def test_without_matplotlib_the_rest_is_written(report, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "confusion.png").touch()  # of an earlier report
    reason = report.save(tmp_path)
    assert reason is not None
    assert reason.startswith("confusion.png needs matplotlib: pip install 'fcmae[bench]'")
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.json", "per_class.csv", "confusion.csv"}


def test_a_folder_that_cannot_be_made(report, tmp_path) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "file/folder"):
        with pytest.raises(UserError, match=f"cannot make the folder .*{place}"):
            report.save(tmp_path / place)
