"""A trained network back from a checkpoint, with what has to be known to use it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor

from fcmae.checkpoints.load_into import load_into
from fcmae.checkpoints.names import STEM, Size, has_grn
from fcmae.checkpoints.weights import Weights, read_weights
from fcmae.data.classification_transforms import check_crop_pct
from fcmae.data.preparation import Preparation
from fcmae.errors import UserError
from fcmae.models.convnext import create_convnext

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A network in evaluation mode, on the CPU, and what belongs to it.

    Attributes:
        net: timm's ConvNeXt; with a classifier if it was fine-tuned.
        source: where its weights are from.
        preparation: of its pictures.
        class_names: of the classifier's outputs; empty if there is none.
        multi_label: whether an image may have any number of classes.
    """

    net: ConvNeXt
    source: Weights
    preparation: Preparation
    class_names: tuple[str, ...]
    multi_label: bool


def load_trained(path: str | Path, *, ema: bool | None = None, image_size: tuple[int, int] | None = None) -> Trained:
    """The network of any checkpoint that `read_weights` reads, built to fit its weights.

    What a file does not say is taken as for ImageNet: 224 px, its mean and deviation (per channel 0.5 and 0.25 where
    there are not three channels), classes named by their numbers.

    Args:
        path: as for `read_weights`: a run's folder, a checkpoint, an export, others' files, a name on the hub.
        ema: the moving average of the weights (True), the weights themselves (False), or the average where there is
            one (None).
        image_size: (height, width) in pixels, instead of that of training.

    Raises:
        UserError: as `read_weights`, or the file says of itself what cannot be.
    """
    source = read_weights(path, ema=ema)
    in_chans = int(source.weights[STEM].shape[1])
    classes = len(source.weights["head.fc.weight"]) if "head.fc.weight" in source.weights else 0
    with torch.device("meta"):  # nothing is allocated before all is known to fit
        report = load_into(_network(source.weights, in_chans=in_chans, classes=classes), source)
    amiss = [name for name in (*report.fresh, *report.left_out) if name.startswith("head.")]
    if classes and amiss:
        raise UserError(
            f"{source.file} holds only part of a classifier, {amiss[0]} is missing or of another shape: give it whole, "
            "or its encoder alone"
        )
    net = _network(source.weights, in_chans=in_chans, classes=classes)
    load_into(net, source)
    try:
        names, preparation = _said(source, classes=classes, in_chans=in_chans)
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{source.file} contradicts itself ({error}); it is damaged, take another checkpoint of the run"
        ) from error
    return Trained(
        net=net.eval(),
        source=source,
        preparation=replace(preparation, image_size=image_size or preparation.image_size),
        class_names=names,
        multi_label=bool((source.description or {}).get("multi_label", False)),
    )


def _said(source: Weights, *, classes: int, in_chans: int) -> tuple[tuple[str, ...], Preparation]:
    """What a file says of classes and pictures, or what is usual where it does not."""
    said = source.description or {}
    names = tuple(map(str, said.get("class_names", range(classes)))) if classes else ()
    if len(names) != classes:
        if source.ours:
            raise ValueError(f"{classes} classes with {len(names)} names")
        names = tuple(map(str, range(classes)))
    given: dict[str, Any] = said.get("input", {})
    side = given.get("image_size", 224)
    height, width = (side, side) if isinstance(side, int) else side
    if not isinstance(height, int) or not isinstance(width, int) or min(height, width) < 1:
        raise ValueError(f"image_size={side!r}")
    default = (_IMAGENET_MEAN, _IMAGENET_STD) if in_chans == 3 else ((0.5,) * in_chans, (0.25,) * in_chans)
    mean, std = (tuple(map(float, given.get(key, value))) for key, value in zip(("mean", "std"), default, strict=True))
    if not source.ours and not len(mean) == len(std) == in_chans:  # what is beside the weights is of other images
        mean, std = default
    if not len(mean) == len(std) == in_chans:
        raise ValueError(f"{in_chans} channels with {len(mean)} means and {len(std)} deviations")
    crop_pct = said.get("crop_pct", "auto")
    check_crop_pct(crop_pct)
    return names, Preparation(image_size=(height, width), mean=mean, std=std, crop_pct=crop_pct)


def _network(weights: dict[str, Tensor], *, in_chans: int, classes: int) -> ConvNeXt:
    size = Size.of(weights)
    return create_convnext(
        "custom",
        depths=size.depths,
        dims=size.dims,
        in_chans=in_chans,
        num_classes=classes,
        use_grn=has_grn(weights),
    )
