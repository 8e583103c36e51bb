"""The mean and the deviation of the pixels of one's own images."""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fcmae.data.datamodule import ImageDataModule
from fcmae.data.loader import open_loader
from fcmae.data.picture import Pixels, as_shares
from fcmae.data.source import Source
from fcmae.errors import UserError

IMAGES = 2000
"""Of so many training images at most: the deviation of a mean over them is a fortieth of that of single images."""
_FAR = 100
"""What lies so far from 0 is no share, whatever it is."""
_LOOKED_AT = 100
"""Images at most that are read once more, to see whether they hold shares."""

log = logging.getLogger(__name__)


def channel_statistics(data: ImageDataModule, advance: Callable[[int, int], object]) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel, over all pixels of the training images as they are validated with.

    Warns where some of them are shares of a range and others large numbers, which no mean fits.

    Args:
        data: the images; whatever it normalises with plays no part.
        advance: told (images done, images in all).

    Returns:
        (mean, deviation), of pixels in [0, 1] where they are integers of 8 or 16 bits.

    Raises:
        UserError: the images have one colour only, or cannot be read.
    """
    indices, _ = data.split()
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))[:IMAGES]
    chosen = [indices[place] for place in sorted(order.tolist())]
    loader = open_loader(
        data.dataset(chosen, train=False),
        [(0, position) for position in range(len(chosen))],
        batch_size=min(64, len(chosen)),
        num_workers=data.num_workers,
        timeout=data.timeout,
    )
    count, done = 0, 0
    total, squares = torch.zeros(2, data.in_chans, dtype=torch.float64)
    largest: dict[str, float] = {}
    for batch in loader:
        pixels = as_shares(batch.images).double().transpose(0, 1).flatten(1)  # (C, B*H*W)
        count += pixels.shape[1]
        total += pixels.sum(1)
        squares += pixels.square().sum(1)
        largest.update(zip(batch.sample_ids, as_shares(batch.images).abs().amax((1, 2, 3)).tolist(), strict=True))
        done += len(batch.images)
        advance(done, len(chosen))
    _warn_of_two_scales(data.source, chosen, largest)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    flat = [channel for channel in range(data.in_chans) if std[channel] <= 1e-6 * (1 + mean[channel].abs())]
    if flat:
        raise UserError(
            f"data.std=auto: channel {flat[0]} has one value in all of {len(chosen)} images; leave it out, or give "
            "data.mean and data.std yourself"
        )
    return [round(value, 6) for value in mean.tolist()], [float(f"{value:.6g}") for value in std.tolist()]


def _warn_of_two_scales(source: Source, indices: Sequence[int], largest: Mapping[str, float]) -> None:
    """Names an image of each kind. Small numbers alone are no sign: a dark image of large numbers has them, too.

    Args:
        source: of the images.
        indices: those that were measured.
        largest: their largest value, by name.
    """
    far = max(largest, key=largest.__getitem__)
    if largest[far] <= _FAR:
        return
    near = [index for index in indices if largest.get(source.sample_id(index), _FAR) < 2]  # resized, 1 may be exceeded
    for index in near[:_LOOKED_AT]:
        if _are_shares(source.open(index).decode()):
            log.warning(
                "images on two scales, which no mean fits: %s is read as shares of its integers' range (0 to 1), %s as "
                "it is (up to %g): save all with one type of numbers, or train on one kind",
                source.sample_id(index),
                far,
                largest[far],
            )
            return


def _are_shares(pixels: Pixels) -> bool:
    """Whether pixels come from integers of 8 or 16 bits: other numbers do not hit a dozen of 65536 values exactly."""
    if not isinstance(pixels, Tensor) or pixels.dtype == torch.uint8:
        return True
    values = pixels.flatten()[:: 1 + pixels.numel() // 100_000].double() * 65535
    whole = values.round()
    exact = torch.isclose(values, whole, rtol=1e-7, atol=0).all() and whole.min() >= 0 and whole.max() <= 65535
    return bool(exact) and len(whole.unique()) > 16
