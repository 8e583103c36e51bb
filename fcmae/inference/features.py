"""Features of a network for probes and for whoever wants them: pooled, or of chosen stages."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.models.convnext import ConvNeXt
from torch import Tensor

from fcmae.data.labelled import LabelledDataModule
from fcmae.data.preparation import Preparation
from fcmae.errors import UserError
from fcmae.files import atomic_writer
from fcmae.inference.batches import Advance, Compute, outputs


def feature_function(net: ConvNeXt, stages: Sequence[int] | None) -> Callable[[Tensor], Tensor]:
    """From images (B, C, H, W) to features (B, D).

    Args:
        net: timm's ConvNeXt.
        stages: 1 to 4, each averaged over its positions, side by side; None: the last stage averaged and normalised,
            which is what a classifier sees.

    Raises:
        UserError: no such stage.
    """
    check_stages(stages)
    if stages is None:
        return lambda images: net.forward_head(net.forward_features(images), pre_logits=True)

    def features(images: Tensor) -> Tensor:
        x, pooled = net.stem(images), {}
        for number, stage in enumerate(net.stages, start=1):
            x = stage(x)
            pooled[number] = x.mean((2, 3))
        return torch.cat([pooled[number] for number in stages], dim=1)

    return features


def check_stages(stages: Sequence[int] | None) -> None:
    """Refuses what are no different stages of a ConvNeXt.

    Raises:
        UserError: says so.
    """
    if stages is not None and (not stages or not set(stages) <= {1, 2, 3, 4} or len(set(stages)) < len(stages)):
        raise UserError(f"stages={list(stages)} must be some of [1, 2, 3, 4], each once, or null")


def labelled_features(
    data: LabelledDataModule,
    indices: Sequence[int],
    preparation: Preparation,
    features: Callable[[Tensor], Tensor],
    compute: Compute,
    *,
    advance: Advance = lambda images: None,
) -> "Features":
    """Of some of a labelled source's images, see `outputs`; on the device."""
    broken: list[tuple[str, str]] = []
    parts = list(
        outputs(
            data.source, indices, preparation, features, compute,
            labels=data.labels, broken=broken, advance=advance,
        )
    )  # fmt: skip
    if not parts:
        raise UserError(f"none of {len(indices)} images can be read: check the files")
    labels = [part.labels for part in parts if part.labels is not None]
    return Features(torch.cat([part.values for part in parts]), torch.cat(labels), broken)


@dataclass(frozen=True)
class Features:
    """Of labelled images.

    Attributes:
        values: (N, D) float32.
        labels: (N,) int64 or (N, classes) float32.
        broken: (sample id, reason) of images that could not be read.
    """

    values: Tensor
    labels: Tensor
    broken: list[tuple[str, str]]

    def to(self, device: torch.device) -> "Features":
        """The same on another device."""
        return Features(self.values.to(device), self.labels.to(device), self.broken)


class FeatureCache:
    """Features on the disk, under a name that follows from what they were made of.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, made_of: dict[str, Any], make: Callable[[], Features]) -> Features:
        """The features, from the disk if they are there already.

        Args:
            made_of: whatever they follow from, as plain data.
            make: computes them.

        Raises:
            UserError: they cannot be written.
        """
        name = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
        file = self.folder / f"features-{name}.safetensors"
        try:
            with safe_open(file, framework="pt") as stored:
                broken = [(name, reason) for name, reason in json.loads(stored.metadata()["broken"])]
                return Features(stored.get_tensor("values"), stored.get_tensor("labels"), broken)
        except (OSError, SafetensorError):  # not there, or truncated
            features = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_writer(file) as opened:
            tensors = {"values": features.values.contiguous(), "labels": features.labels.contiguous()}
            opened.write(save(tensors, metadata={"broken": json.dumps(features.broken)}))
        return features


def weights_digest(net: ConvNeXt) -> str:
    """A name for the very weights of a network."""
    digest = hashlib.sha256()
    for name, value in net.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
