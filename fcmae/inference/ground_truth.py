"""What a classifier is judged by: images that it has not learned from, and their labels by its own numbers."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fcmae.data.labelled import LabelledDataModule
from fcmae.errors import UserError
from fcmae.inference.trained import Trained

log = logging.getLogger(__name__)


def indices_of(split: str, data: LabelledDataModule, trained: Trained) -> Sequence[int]:
    """The images of one part: those held out while this network was trained, where it was on the same images.

    Args:
        split: `val`, `train` or `all`.
        data: the images.
        trained: the classifier, or an encoder.
    """
    held_out = data.labelled.held_out
    if split == "all":
        return range(len(data.source))
    if held_out is None and trained.source.ours:  # they were held out at random, so many as the run was told to
        said: dict[str, Any] = trained.source.description or {}
        of_the_run = said.get("recipe", {}).get("data", {}).get("val_images")
        if said.get("steps", {}).get("data") == data.fingerprint() and type(of_the_run) is int and of_the_run > 0:
            data.val_images = of_the_run
        elif split == "val" and trained.class_names:  # an encoder has learned from no labels
            log.warning(
                "%s was trained on other images than these, or they have changed since: if it has learned from some of "
                "them, they may be among those that are evaluated now; split=all takes every image",
                trained.source.file,
            )
    if split == "val" and held_out is not None:
        return held_out  # whatever there is to learn from
    return data.split()[split == "val"]


def labels_for(trained: Trained, data: LabelledDataModule, *, by_order: bool) -> Tensor:
    """The data's labels, by the classifier's numbers.

    Args:
        trained: the classifier.
        data: the images, with classes by name.
        by_order: the data's n-th class is the classifier's n-th, whatever they are called; so it is, too, where the
            classifier does not name its classes.

    Raises:
        UserError: the data has a class that the classifier does not know, or other kinds of labels.
    """
    names, theirs, file = list(trained.class_names), data.class_names, trained.source.file
    if data.is_multi_label != trained.multi_label:
        kinds = ("one label per image", "several labels per image")
        raise UserError(
            f"{file} knows {kinds[trained.multi_label]}, the data has {kinds[data.is_multi_label]}: "
            "evaluate it on images that are labelled as those of its training"
        )
    if names == theirs:
        return data.labels
    if by_order and len(names) != len(theirs):
        raise UserError(
            f"classes=by_order: {file} knows {len(names)} classes, the data has {len(theirs)}; leave the option away, "
            "or evaluate on images of as many classes"
        )
    unnamed = not (trained.source.description or {}).get("class_names")
    if by_order or (unnamed and len(names) == len(theirs) and set(names) != set(theirs)):
        what = f"calls them {names[0]!r} to {names[-1]!r}" if by_order and not unnamed else "does not name its classes"
        log.warning("%s %s: they are taken in the order of the data's", file, what)
        return data.labels
    unknown = [name for name in theirs if name not in names]
    if unknown:
        raise UserError(
            f"class {unknown[0]!r} of the data is none of the {len(names)} that {file} knows "
            f"({', '.join(names[:10])}{', ...' if len(names) > 10 else ''}): rename or leave out its images"
            + (", or give classes=by_order if the order is the same" if len(names) == len(theirs) else "")
        )
    places = torch.tensor([names.index(name) for name in theirs])
    if not data.is_multi_label:
        return places[data.labels]
    labels = torch.zeros(len(data.labels), len(names), dtype=torch.bool)
    labels[:, places] = data.labels
    return labels
