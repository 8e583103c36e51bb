"""Images with labels: few of them, classes of unequal size, several labels per image."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fcmae.data.datamodule import ImageDataModule, compact
from fcmae.data.dataset import ImageDataset
from fcmae.data.randomness import mix_seed
from fcmae.data.source import LabelledSource
from fcmae.errors import UserError

Sampling = Literal["uniform", "balanced"]


@dataclass(kw_only=True, eq=False)
class LabelledDataModule(ImageDataModule):
    """Images whose classes are known; training may be given few of them.

    Pre-training takes such images too: the chosen ones, without their labels.

    Args:
        fraction: share of each class's training images to use, at least one; 1.0 for all.
        shots: training images of each class to use, instead of a share; None for all.
        sampling: `uniform`: every training image once per epoch; `balanced`: drawn with replacement, such that every
            class comes equally often.

    Attributes:
        leave_out_broken: in validation, whether a broken image is left out (which needs labels), not replaced by
            another; to be set before the fit.
    """

    fraction: float
    shots: int | None
    sampling: Sampling

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise UserError(f"data.fraction={self.fraction} must be a share in (0, 1]")
        if self.shots is not None and (self.shots < 1 or self.fraction != 1):
            raise UserError(
                f"data.shots={self.shots}, data.fraction={self.fraction}: give a whole number from 1, or a share in "
                "(0, 1], not both"
            )
        self.leave_out_broken = False
        self._split: tuple[Sequence[int], Sequence[int]] | None = None

    @abstractmethod
    def load_source(self) -> LabelledSource:
        """Finds the images and their classes.

        Raises:
            UserError: there are none, or their labels are wrong.
        """

    @property
    def labelled(self) -> LabelledSource:
        """The images and their classes."""
        return self.source  # type: ignore[return-value]  # load_source gives nothing else

    @property
    def class_names(self) -> list[str]:
        """In the order of the labels."""
        return self.labelled.class_names

    @property
    def labels(self) -> Tensor:
        """(N,) int64, or (N, classes) bool: of all images.

        Raises:
            UserError: they have none.
        """
        if self.labelled.labels is None:
            raise UserError(
                f"{type(self.source).__name__}: the images have no labels; they can be pre-trained on, nothing else"
            )
        return self.labelled.labels

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have any number of classes."""
        return self.labels.ndim == 2

    def split(self) -> tuple[Sequence[int], Sequence[int]]:
        """Indices into the source: (to learn from, held out).

        Raises:
            UserError: fewer than two images, a class without one to learn from, or fewer than asked for.
        """
        if self._split is None:
            train, held_out = super().split() if self.labelled.held_out is None else self._given_split()
            self._split = train if self.labelled.labels is None else self._chosen(train), held_out
        return self._split

    def hold_out(self, count: int, held_out: int) -> tuple[Sequence[int], Sequence[int]]:
        """So many at random; a class that would lose all of its images to them gets one back."""
        train, validation = super().hold_out(count, held_out)
        labels = self.labelled.labels
        if labels is None:
            return train, validation
        missing = set((self._counts(torch.as_tensor(train)) == 0).nonzero()[:, 0].tolist())
        back = set[int]()
        for index in validation if missing else ():
            classes = set(labels[index].nonzero()[:, 0].tolist() if labels.ndim == 2 else [int(labels[index])])
            if classes & missing and len(back) + 1 < len(validation):
                missing -= classes
                back.add(index)
        if not back:
            return train, validation
        taken = torch.isin(torch.as_tensor(validation), torch.tensor(sorted(back)))
        held = torch.as_tensor(validation)[~taken]
        return compact(torch.cat([torch.as_tensor(train), torch.tensor(sorted(back))]).sort().values), compact(held)

    def fingerprint(self) -> str:
        """Changes also when labels or the part to validate with change."""
        digest = hashlib.sha256(super().fingerprint().encode())
        digest.update(repr((self.class_names, self.labelled.held_out)).encode())
        if self.labelled.labels is not None:
            digest.update(self.labelled.labels.numpy().tobytes())
        return f"{len(self.source)} images, {digest.hexdigest()[:12]}"

    def train_labels(self) -> Tensor:
        """(N,) int64 or (N, classes) bool: of the images to learn from."""
        return self.labels[self.split()[0]]

    def class_counts(self) -> Tensor:
        """(classes,) int64: how many images to learn from each class has.

        Raises:
            UserError: one has none.
        """
        counts = self._counts(torch.as_tensor(self.split()[0]))
        for name, count in zip(self.class_names, counts.tolist(), strict=True):
            if not count:
                raise UserError(f"class {name!r} has no image to learn from: add some, or leave the class out")
        return counts

    def _counts(self, indices: Tensor) -> Tensor:
        """(classes,) int64: how many of some images each class has."""
        labels = self.labels[indices]
        return labels.sum(0) if self.is_multi_label else labels.bincount(minlength=len(self.class_names))

    def weights(self) -> Tensor | None:
        """For balanced sampling: one over the size of the image's class.

        Raises:
            UserError: images may have several classes.
        """
        if self.sampling == "uniform":
            return None
        if self.is_multi_label:
            raise UserError("data.sampling=balanced needs one class per image; use class_weights=balanced")
        return 1 / self.class_counts().double()[self.train_labels()]

    def dataset(self, indices: Sequence[int], *, train: bool) -> ImageDataset:
        """Some of the images with their labels."""
        dataset = super().dataset(indices, train=train)
        dataset.labels = self.labelled.labels
        if self.leave_out_broken and not train:
            dataset.stand_in = torch.zeros(self.in_chans, *self.size, dtype=torch.uint8)
        return dataset

    def _given_split(self) -> tuple[Sequence[int], Sequence[int]]:
        held_out = self.labelled.held_out or []
        if isinstance(held_out, range) and held_out.stop == len(self.source):
            return range(held_out.start), held_out
        learned_from = torch.ones(len(self.source), dtype=torch.bool)
        learned_from[torch.as_tensor(held_out, dtype=torch.int64)] = False
        return compact(learned_from.nonzero()[:, 0]), held_out

    def _chosen(self, train: Sequence[int]) -> Sequence[int]:
        """The few labels: drawn from each class by the seed."""
        if self.shots is None and self.fraction == 1:
            return train
        members = _members(self.labels[torch.as_tensor(train)], len(self.class_names))
        for name, positions in zip(self.class_names, members, strict=True):
            if len(positions) < (self.shots or 0):
                raise UserError(
                    f"class {name!r} has {len(positions)} images to learn from, not data.shots={self.shots} images: "
                    "add some, or leave the class out, or ask for fewer"
                )
        chosen: set[int] = set()
        if self.is_multi_label and self.shots is None:  # images without any label are a group of their own
            members = [*members, (~self.labels[torch.as_tensor(train)].any(1)).nonzero()[:, 0]]
        for index, positions in enumerate(members):
            generator = torch.Generator().manual_seed(mix_seed("few labels", self.seed, index))
            wanted_count = self.shots or max(1, round(self.fraction * len(positions)))
            order = torch.randperm(len(positions), generator=generator)[:wanted_count]
            chosen |= {train[position] for position in positions[order].tolist()}
        return sorted(chosen)


def _members(labels: Tensor, classes: int) -> Sequence[Tensor]:
    """The positions of each class's images."""
    if labels.ndim == 2:
        return [column.nonzero()[:, 0] for column in labels.T]
    return labels.argsort(stable=True).split(labels.bincount(minlength=classes).tolist())
