"""Engine `torch`: unpack to the full map with zeros at hidden places, convolve densely, pack again.

Works on every device without a compiler, and is what the other engines are checked against.
"""

import torch.nn.functional as F
from torch import Tensor

from fcmae.masking import Mask
from fcmae.packing import pack, unpack


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Mask) -> Tensor:
    """Depthwise convolution over the visible neighbours of each visible position (a submanifold convolution).

    Args:
        x: (B, C, V*p, p), a packed image.
        weight: (C, 1, k, k), k odd.
        bias: (C,) or None.
        mask: what is visible.

    Returns:
        (B, C, V*p, p). Positions outside the image and in hidden patches count as zeros.
    """
    full = unpack(x, mask)  # (B, C, h*p, w*p)
    full = F.conv2d(full, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    packed = pack(full, mask)  # (B, C, V*p, p)
    # The bias waits until here: its gradient over the full map costs the CPU a fifth of the convolution's backward.
    return packed if bias is None else packed + bias.to(packed.dtype).view(-1, 1, 1)
