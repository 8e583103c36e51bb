"""Images through a network, batch by batch, with the unreadable ones counted."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fcmae.data.dataset import ImageDataset
from fcmae.data.loader import open_loader
from fcmae.data.preparation import Preparation
from fcmae.data.source import Source
from fcmae.errors import UserError, in_a_line

Advance = Callable[[int], object]
"""Told that so many more images are done."""


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How a network is run.

    Args:
        batch_size: images per batch.
        num_workers: processes that read images; `auto` is up to 8, within the cores of this process.
        device: cpu, cuda or cuda:<index>; `auto`: a GPU if there is one.
        precision: 32, or bf16 for autocast to bfloat16.
        max_broken: share of unreadable images at which the work stops; a single one never stops it.

    Raises:
        UserError: a value out of its bounds, or no such device.
    """

    batch_size: int
    num_workers: int | str
    device: str
    precision: int | str
    max_broken: float

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1")
        if self.num_workers != "auto" and (not isinstance(self.num_workers, int) or self.num_workers < 0):
            raise UserError(f"num_workers={self.num_workers!r} must be a number from 0, or auto")
        if str(self.precision) not in ("32", "bf16"):
            raise UserError(f"precision={self.precision!r} is unknown: use 32 or bf16")
        if not 0 <= self.max_broken <= 1:
            raise UserError(f"max_broken={self.max_broken} must be a share in [0, 1]")
        _ = self.torch_device

    @property
    def torch_device(self) -> torch.device:
        """The device that is meant."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            told = f"device={self.device!r} cannot be used ({in_a_line(error)}): use cpu, cuda or auto"
            raise UserError(told) from error
        return device

    def place(self, net: nn.Module) -> None:
        """Moves a network to the device."""
        net.to(device=self.torch_device, memory_format=torch.channels_last)  # type: ignore[call-overload]


@dataclass(frozen=True)
class Output:
    """What a network made of a batch's readable images.

    Attributes:
        values: (B, ...) float32, on the device.
        sample_ids: names of the images.
        labels: (B,) int64 or (B, classes) float32, on the device, where there are labels.
    """

    values: Tensor
    sample_ids: list[str]
    labels: Tensor | None


def outputs(
    source: Source,
    indices: Sequence[int],
    preparation: Preparation,
    apply: Callable[[Tensor], Tensor],
    compute: Compute,
    *,
    labels: Tensor | None = None,
    broken: list[tuple[str, str]],
    advance: Advance = lambda images: None,
) -> Iterator[Output]:
    """What `apply` makes of some of a source's images, prepared as in the network's training.

    Args:
        source: of the images.
        indices: which of them, in this order.
        preparation: of the images.
        apply: (B, C, H, W) normalised images on the device -> (B, ...).
        compute: how.
        labels: of all the source's images.
        broken: gets (sample id, reason) of images that cannot be read; they are left out.
        advance: told the progress.

    Raises:
        UserError: too many images cannot be read.
    """
    device = compute.torch_device
    dataset = ImageDataset(
        source=source,
        indices=indices,
        transform=preparation.transform(),
        seed=0,
        labels=labels,
        stand_in=torch.zeros(preparation.in_chans, *preparation.image_size, dtype=torch.uint8),
    )
    loader = open_loader(
        dataset,
        [(0, position) for position in range(len(indices))],
        batch_size=compute.batch_size,
        num_workers=compute.num_workers,
    )
    normalize, first_broken = preparation.normalization(), len(broken)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=str(compute.precision) == "bf16")
    for batch in loader:
        broken += batch.broken
        if len(broken) - first_broken > max(1, compute.max_broken * len(indices)):
            raise UserError(
                f"{len(broken)} of {len(indices)} images cannot be read (max_broken={compute.max_broken}), the last "
                f"one {broken[-1][0]} ({broken[-1][1]}): mend or remove them, or raise max_broken"
            )
        unreadable = {name for name, _ in batch.broken}
        kept = [position for position, name in enumerate(batch.sample_ids) if name not in unreadable]
        if kept:
            with torch.no_grad(), autocast:
                values = apply(normalize(batch.images[kept].to(device, non_blocking=True)))
            chosen = None if batch.labels is None else batch.labels[kept].to(device)
            yield Output(values.float(), [batch.sample_ids[position] for position in kept], chosen)
        advance(len(batch.sample_ids))
