"""How well features tell classes apart without any training: a vote among the nearest training images.

Shapes: N training images, M images to classify, F features, C classes.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.errors import UserError

K = (10, 20, 100, 200)  # the choices of Caron et al. 2021, who mostly report 20
_HELD = 2**25  # numbers at once: 128 MiB in float32


class KNN:
    """A weighted vote of the k nearest training images, for several k at once.

    Wu et al. 2018, section 3.4, as in Caron et al. 2021 (DINO), appendix F.1: each of the k training images with the
    largest cosine similarity s votes for its class with weight exp(s / temperature).

    Args:
        features: (N, F) of the training images, on the device that is to do the work.
        labels: (N,) int64; images with label -1 are left out.
        classes: how many there are.
        k: numbers of neighbours. Those above the number of training images are dropped; `self.k` has the others.
        temperature: small ones let the nearest decide.

    Raises:
        UserError: there are fewer training images than the smallest k, a value out of its bounds, or features that
            are not finite.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, *, classes: int, k: Sequence[int] = K, temperature: float = 0.07
    ) -> None:
        if temperature <= 0:
            raise UserError(f"temperature={temperature} must be above 0, such as 0.07")
        if not k or min(k) < 1:
            raise UserError(f"k={list(k)} must be numbers of neighbours from 1, such as {list(K)}")
        features, self._labels = labelled_rows(features, labels, classes)
        self.k = tuple(sorted({number for number in k if number <= len(features)}))
        if not self.k:
            raise UserError(f"k={list(k)}, but only {len(features)} labelled training images: use a k up to that")
        self._features = F.normalize(features)
        self._classes, self._temperature = classes, temperature

    def predict(self, features: Tensor) -> dict[int, Tensor]:
        """For each of `self.k` the class with the largest vote, the first of equals: (M,) int64.

        Args:
            features: (M, F), on any device; memory stays bounded, however many they are.

        Raises:
            UserError: they are not of the width of the training features, or not finite.
        """
        parts = [votes.argmax(2) for votes in self._vote(features)]  # of (k, rows)
        return dict(zip(self.k, torch.cat(parts, dim=1), strict=True))

    def scores(self, features: Tensor) -> dict[int, Tensor]:
        """For each of `self.k` the shares of the classes in the vote, which add up to 1: (M, C).

        Args:
            features: (M, F), on any device.

        Raises:
            UserError: they are not of the width of the training features, or not finite.
        """
        return dict(zip(self.k, torch.cat(list(self._vote(features)), dim=1), strict=True))

    @torch.no_grad()
    def _vote(self, features: Tensor) -> Iterator[Tensor]:
        """(k, rows, C) of a few images at a time."""
        check_features(features, width=self._features.shape[1])
        # Of an image: its similarities; the running vote, the one of each k, and all of these stacked.
        held = len(self._features) + (1 + 2 * len(self.k)) * self._classes
        for part in features.split(max(1, _HELD // held)):
            with torch.autocast(self._features.device.type, enabled=False):
                similarity = F.normalize(part.to(self._features)) @ self._features.T  # (rows, N)
                nearest, neighbours = similarity.topk(self.k[-1])  # (rows, largest k), the nearest first
            # Relative to the nearest, a weight cannot overflow; a factor common to a vote changes nothing.
            weights = ((nearest - nearest[:, :1]) / self._temperature).exp()
            labels, total, votes, start = self._labels[neighbours], weights.new_zeros(len(part), self._classes), [], 0
            for stop in self.k:
                total.scatter_add_(1, labels[:, start:stop], weights[:, start:stop])
                votes.append(total / total.sum(1, keepdim=True))
                start = stop
            yield torch.stack(votes)


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """The share of right predictions among the images with a label.

    Args:
        predictions: (M,) int64.
        labels: (M,) int64, -1 where there is none.

    Raises:
        UserError: no image has a label.
    """
    known = labels >= 0
    if not known.any():
        raise UserError(f"none of {len(labels)} images has a label: an accuracy needs at least one")
    return float((predictions[known] == labels.to(predictions.device)[known]).double().mean())


def labelled_rows(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The rows that have a label, in float32 at least, and their labels, on the device of the features.

    Args:
        features: (N, F).
        labels: (N,) int64, -1 where there is none.
        classes: how many there are.

    Raises:
        UserError: features that are not finite, or a label that is no class.
    """
    assert len(features) == len(labels), f"{len(features)} rows of features, {len(labels)} labels"
    check_features(features)
    labels = labels.to(features.device)
    if labels.numel() and not -1 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UserError(f"labels from {labels.min()} to {labels.max()} must be -1 (none) or below {classes} classes")
    known = labels >= 0
    return features[known].to(torch.promote_types(features.dtype, torch.float32)), labels[known]


def check_features(features: Tensor, *, width: int | None = None) -> None:
    """Refuses features of which nothing can be learned.

    Raises:
        UserError: their number is not `width`, or they are not finite.
    """
    assert features.ndim == 2, f"features of shape {list(features.shape)}"
    if width not in (None, features.shape[1]):
        raise UserError(f"{features.shape[1]} features per image, but {width} in training: use one model for both")
    if not features.isfinite().all():
        raise UserError("features hold NaN or infinity: the model has diverged; use an earlier checkpoint")
