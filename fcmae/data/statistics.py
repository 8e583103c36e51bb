"""The mean and the deviation of the pixels of one's own images."""

from collections.abc import Callable

import torch

from fcmae.data.datamodule import ImageDataModule
from fcmae.data.loader import open_loader
from fcmae.data.picture import as_shares
from fcmae.errors import UserError

IMAGES = 2000
"""Of so many training images at most: the deviation of a mean over them is a fortieth of that of single images."""


def channel_statistics(data: ImageDataModule, advance: Callable[[int, int], object]) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel, over all pixels of the training images as they are validated with.

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
    for batch in loader:
        pixels = as_shares(batch.images).double().transpose(0, 1).flatten(1)  # (C, B*H*W)
        count += pixels.shape[1]
        total += pixels.sum(1)
        squares += pixels.square().sum(1)
        done += len(batch.images)
        advance(done, len(chosen))
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    flat = [channel for channel in range(data.in_chans) if std[channel] <= 1e-6 * (1 + mean[channel].abs())]
    if flat:
        raise UserError(
            f"data.std=auto: channel {flat[0]} has one value in all of {len(chosen)} images; leave it out, or give "
            "data.mean and data.std yourself"
        )
    return [round(value, 6) for value in mean.tolist()], [float(f"{value:.6g}") for value in std.tolist()]
