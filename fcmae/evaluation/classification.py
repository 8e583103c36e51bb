"""How good a classifier is: numbers over a whole data set and all ranks.

Shapes: B images of a batch, C classes.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import (
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MultilabelAveragePrecision,
    MultilabelStatScores,
)
from torchmetrics.functional.classification import multilabel_average_precision

from fcmae.errors import UserError
from fcmae.evaluation.classification_report import ClassificationReport

TOP = 5
BELOW_ONE = 1 - 2**-24  # the next number in float32
MOST_CONFUSED = 2000  # classes; the table of confusions grows with their square


class ClassificationMetrics(nn.Module):
    """Gathers what a classifier makes of images, batch by batch; the numbers are those of all ranks together.

    Args:
        classes: C.
        multi_label: whether an image may have any number of classes.

    Raises:
        UserError: fewer than two classes; fewer than one, where an image may have any number.
    """

    def __init__(self, classes: int, *, multi_label: bool = False) -> None:
        super().__init__()
        least = 1 if multi_label else 2
        if classes < least:
            raise UserError(f"{classes} classes are too few for a classifier: it needs at least {least}")
        self.classes, self.multi_label = classes, multi_label
        self._gathered = _ManyPerImage(classes) if multi_label else _OnePerImage(classes)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch.

        Args:
            logits: (B, C).
            labels: (B,) int64, -1 for an image to leave out; or (B, C), 1 for each class that is there, else 0.

        Raises:
            UserError: a label is not below C.
        """
        assert logits.shape[1:] == (self.classes,), f"logits of shape {list(logits.shape)}, {self.classes} classes"
        assert labels.shape == (logits.shape if self.multi_label else logits.shape[:1]), f"labels {list(labels.shape)}"
        self._gathered.update(_precise(logits), labels)

    def summary(self) -> dict[str, float]:
        """The numbers to follow during training. Shares are in 0 to 1; without any label, all are NaN.

        Returns:
            `loss`: mean cross entropy; with several classes per image, that of all yes-or-no decisions. With one class
            per image `acc1`, `balanced_accuracy` (mean of the classes' recalls), `acc5` (not with five classes or
            fewer, where it is 1) and `ece` (expected calibration error, Guo et al. 2017: 15 bins of equal width). With
            several `map` (mean average precision), `f1_micro` and `f1_macro` (for probabilities above 0.5). Means of
            classes leave out those where it is undefined.
        """
        return self._compute().metrics

    def compute(self, class_names: Sequence[str]) -> ClassificationReport:
        """All there is to say; without confusions for more than 2000 classes.

        Args:
            class_names: C names, in the order of the labels.

        Raises:
            UserError: no image has a label.
        """
        assert len(class_names) == self.classes, f"{len(class_names)} names for {self.classes} classes"
        numbers = self._compute()
        if not numbers.images:
            raise UserError("no image has a label: a classifier cannot be evaluated without any")
        return ClassificationReport(class_names=tuple(class_names), **numbers._asdict())

    def reset(self) -> None:
        """Forgets all batches."""
        for metric in self._gathered.children():
            metric.reset()

    def _compute(self) -> "_Numbers":
        # torchmetrics gathers lists of tensors by their number of dimensions and type, which an empty list has not: a
        # rank without any batch would break it.
        logits = torch.zeros(0, self.classes, device=self._gathered.loss.device)
        self.update(logits, logits if self.multi_label else logits.new_zeros(0, dtype=torch.int64))
        with _without_warnings():
            return self._gathered.compute()


def average_precision(logits: Tensor, labels: Tensor) -> Tensor:
    """Per class the precision at each of its images, averaged, as scikit-learn has it; NaN for a class without any.

    Args:
        logits: (N, C).
        labels: (N, C), 1 for each class that is there, else 0.

    Returns:
        (C,).
    """
    labels = labels.to(logits.device).long()
    with _without_warnings():
        values = multilabel_average_precision(
            _ranks(_precise(logits)), labels, labels.shape[1], average=None, validate_args=False
        )
    return torch.where(labels.any(0), values, torch.nan)


class _Numbers(NamedTuple):
    """Of a report; see there."""

    images: int
    metrics: dict[str, float]
    per_class: dict[str, list[float]]
    confusion: Tensor | None


class _OnePerImage(nn.Module):
    """For labels (B,)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        # By default torchmetrics leaves out what is NaN, and a diverged model would look fine.
        self.loss, self.hits = MeanMetric(nan_strategy="disable"), MeanMetric(nan_strategy="disable")
        self.calibration = MulticlassCalibrationError(classes, n_bins=15, norm="l1", validate_args=False)
        self.counts = _Counts(classes)
        few = classes <= MOST_CONFUSED
        self.confusion = MulticlassConfusionMatrix(classes, validate_args=False) if few else None

    def update(self, logits: Tensor, labels: Tensor) -> None:
        logits, labels = logits[labels >= 0], labels[labels >= 0]
        classes = logits.shape[1]
        if len(labels) and int(labels.max()) >= classes:
            raise UserError(f"label {labels.max()}, but the classifier has {classes} classes: give it data of those")
        self.loss.update(F.cross_entropy(logits, labels, reduction="none"))
        self.hits.update((logits.topk(min(TOP, classes)).indices == labels[:, None]).any(1).to(logits))
        # Probabilities, since torchmetrics takes a batch of logits for probabilities if all lie in 0 to 1; and below 1,
        # since it counts those of exactly 1 in a sixteenth bin.
        self.calibration.update(logits.softmax(1).clamp(max=BELOW_ONE), labels)
        self.counts.update(logits.argmax(1), labels)
        if self.confusion is not None:
            self.confusion.update(logits.argmax(1), labels)

    def compute(self) -> _Numbers:
        right, predicted, support = self.counts.compute().cpu()  # (C,) each
        images = int(support.sum())
        scores = _scores(right, predicted, support)
        metrics = {
            "loss": float(self.loss.compute()),
            "acc1": int(right.sum()) / images if images else math.nan,
            "balanced_accuracy": float(torch.tensor(scores["recall"], dtype=torch.float64).nanmean()),
        }
        if len(support) > TOP:
            metrics["acc5"] = float(self.hits.compute())
        metrics["ece"] = float(self.calibration.compute())
        per_class = {"images": support.tolist(), **scores}
        confusion = None if self.confusion is None else self.confusion.compute().cpu()
        return _Numbers(images, metrics, per_class, confusion)


class _ManyPerImage(nn.Module):
    """For labels (B, C)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.loss = MeanMetric(nan_strategy="disable")
        self.ranking = MultilabelAveragePrecision(classes, average=None, validate_args=False)
        self.counts = MultilabelStatScores(classes, average=None, validate_args=False)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        self.loss.update(F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").mean(1))
        self.ranking.update(_ranks(logits), labels.long())
        if len(labels):
            self.counts.update(_ranks(logits), labels.long())

    def compute(self) -> _Numbers:
        tp, fp, tn, fn, support = self.counts.compute().cpu().T  # (C,) each
        images = int((tp + fp + tn + fn)[0])
        ranking = self.ranking.compute().cpu() if images else torch.zeros(len(tp))
        precision = torch.where(support > 0, ranking, torch.nan)
        scores = _scores(tp, tp + fp, support)
        metrics = {
            "loss": float(self.loss.compute()),
            "map": float(precision.nanmean()),
            "f1_micro": _scores(*(x.sum()[None] for x in (tp, tp + fp, support)))["f1"][0],
            "f1_macro": float(torch.tensor(scores["f1"], dtype=torch.float64).nanmean()),
        }
        per_class = {"images": support.tolist(), "average_precision": precision.tolist(), **scores}
        return _Numbers(images, metrics, per_class, None)


class _Counts(Metric):
    """Per class how many images were rightly taken for it, how many were taken for it, and how many are of it.

    torchmetrics' own counts them by way of a table of all pairs of classes, which for 21,841 classes takes 3.8 GB.
    """

    counts: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(3, classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        values = (labels[predictions == labels], predictions, labels)
        self.counts += torch.stack([x.bincount(minlength=self.counts.shape[1]) for x in values])

    def compute(self) -> Tensor:
        return self.counts


def _precise(logits: Tensor) -> Tensor:
    """In float64, where there is one."""
    return logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)


def _ranks(logits: Tensor) -> Tensor:
    """From 0 to 1, in the logits' order, and above 0.5 where they are above 0.

    A sigmoid would make equals of all logits above 37, in float32 of all above 17; and torchmetrics takes the sigmoid
    of every batch that is not within 0 to 1, and of no other.
    """
    return 0.5 + 0.5 * F.softsign(logits)


def _scores(right: Tensor, predicted: Tensor, support: Tensor) -> dict[str, list[float]]:
    """Of counts, (C,) int64: what is right, of what was said, and of what is there; 0 / 0 is NaN."""
    right = right.double()
    scores = {"precision": right / predicted, "recall": right / support, "f1": 2 * right / (predicted + support)}
    return {name: values.tolist() for name, values in scores.items()}


@contextmanager
def _without_warnings() -> Iterator[None]:
    """torchmetrics warns of classes without images and of ranks without batches, which are dealt with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
