"""How well a linear classifier does on the features of a frozen network.

Shapes: N training images, M held-out images, F features, C classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.errors import UserError
from fcmae.evaluation.classification import average_precision
from fcmae.evaluation.knn import accuracy, check_features, labelled_rows

PENALTIES = (1e4, 1e3, 1e2, 1e1, 1e0, 1e-1, 1e-2)
_LOGITS = 2**25  # held at once: 128 MiB in float32


class LinearProbe(NamedTuple):
    """What linear classifiers reach on held-out features."""

    scores: dict[float, float]
    """Per penalty, the largest first: top-1 accuracy, or mean average precision for several labels per image."""
    best: float
    """The penalty with the best score, the largest of equals. As it was chosen on the held-out images, which is
    customary, its score flatters a little."""
    logits: Tensor
    """(M, C) of the best classifier, on the device of the features."""


@torch.no_grad()
def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    penalties: Sequence[float] = PENALTIES,
    max_iterations: int = 1000,
) -> LinearProbe:
    """Logistic regression on cached features, once per strength of the L2 penalty.

    The protocol of Radford et al. 2021 (CLIP), appendix A.3: L-BFGS on the whole training set at once, up to 1000
    iterations, and the penalty with the best result. Every feature first gets mean 0 and deviation 1 over the training
    images, as in He et al. 2022 (MAE), appendix A.1. The problem is convex, so neither a learning rate nor a seed nor
    an order of images matters; each penalty starts from the solution of the one before it. Minimised is

        sum of the cross entropies of the images + penalty / 2 * sum of the squared weights, biases not counted

    so that a penalty is one over scikit-learn's C. The cross entropy is that of softmax, or, for several labels per
    image, the sum of the classes' binary ones.

    Args:
        train_features: (N, F), on the device that is to do the work; float64 is kept, else float32.
        train_labels: (N,) int64, images with -1 are left out; or (N, C), 1 for each class that is there, else 0.
        features: (M, F), held out.
        labels: (M,) or (M, C), likewise.
        classes: how many there are.
        penalties: of which to choose the best.
        max_iterations: of L-BFGS, for each penalty.

    Raises:
        UserError: no labelled image to learn from or held out, a value out of its bounds, or features that are not
            finite.
    """
    if not penalties or min(penalties) <= 0:
        raise UserError(f"penalties={list(penalties)} must be above 0, such as {list(PENALTIES)}")
    if max_iterations < 1:
        raise UserError(f"max_iterations={max_iterations} must be at least 1")
    check_features(features, width=train_features.shape[1])
    x, y = _rows(train_features, train_labels, classes)
    if not len(x):
        raise UserError("no training image has a label: a linear probe needs some of each class")
    mean, scale = _statistics(x)
    x, held_out = (x - mean) / scale, (features.to(x) - mean) / scale
    weight, scores, best, logits = x.new_zeros(x.shape[1] + 1, classes), {}, 0.0, x.new_zeros(0)
    for penalty in sorted(set(penalties), reverse=True):
        with torch.autocast(x.device.type, enabled=False):
            _minimize(x, y, weight, penalty, max_iterations)
            prediction = held_out @ weight[:-1] + weight[-1]  # (M, C)
        scores[penalty] = _score(prediction, labels)
        if scores[penalty] > scores.get(best, -1.0):
            best, logits = penalty, prediction
    return LinearProbe(scores, best, logits)


def _rows(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """What can be learned from: (N, F) in float32 at least, and (N,) int64 or (N, C) of the same type."""
    if labels.ndim == 1:
        return labelled_rows(features, labels, classes)
    assert labels.shape == (len(features), classes), f"labels of shape {list(labels.shape)}"
    features, _ = labelled_rows(features, labels.new_zeros(len(labels), dtype=torch.int64), classes)
    return features, labels.to(features)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature, (F,); a constant feature gets deviation 1, so that it becomes 0."""
    mean, deviation = x.mean(0), x.std(0, correction=0)
    rounding = 10 * torch.finfo(x.dtype).eps * mean.abs()
    return mean, torch.where(deviation > rounding, deviation, 1)


def _minimize(x: Tensor, y: Tensor, weight: Tensor, penalty: float, max_iterations: int) -> None:
    """Changes weight (F + 1, C), whose last row is the bias, to the minimum of the mean loss."""
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=max_iterations,
        history_size=20,
        tolerance_grad=1e-5,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        loss, gradient = _loss_and_gradient(x, y, weight)
        gradient[:-1] += penalty * weight[:-1]
        weight.grad = gradient / len(x)
        return (loss + 0.5 * penalty * weight[:-1].square().sum()) / len(x)

    optimizer.step(closure)


def _loss_and_gradient(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Summed over the images, a few at a time: of either cross entropy, the gradient is prediction - target."""
    loss, gradient = x.new_zeros(()), torch.zeros_like(weight)
    rows = max(1, _LOGITS // weight.shape[1])
    for part, labels in zip(x.split(rows), y.split(rows), strict=True):
        logits = part @ weight[:-1] + weight[-1]  # (rows, C)
        if labels.ndim == 1:
            loss += F.cross_entropy(logits, labels, reduction="sum")
            residual = logits.softmax(1).scatter_add_(1, labels[:, None], -torch.ones_like(logits[:, :1]))
        else:
            loss += F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
            residual = logits.sigmoid() - labels
        gradient[:-1] += part.T @ residual
        gradient[-1] += residual.sum(0)
    return loss, gradient


def _score(logits: Tensor, labels: Tensor) -> float:
    if labels.ndim == 1:
        return accuracy(logits.argmax(1), labels)
    if not labels.any():
        raise UserError(f"none of {len(labels)} held-out images has a label: mean average precision needs some")
    return float(average_precision(logits, labels).nanmean())
