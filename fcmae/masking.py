"""What is visible: the mask, and the strategies that draw one.

Shapes: B images, (h, w) grid of mask patches, L = h * w, V visible patches per image.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fcmae.errors import UserError


@dataclass(frozen=True, eq=False)
class Mask:
    """Which patches of each image are seen; every image of a batch sees the same number.

    Attributes:
        visible: (B, h, w) bool, True means seen.
        index: (B, V) int64, the seen cells of each image, numbered row by row, ascending. Derived from `visible`
            when it is not given; who gives it vouches that both agree (it saves reading the device's memory).
        slots: (B, h, w) int32, where each cell's patch lies among the V, or -1: the inverse of `index`; derived.

    Raises:
        UserError: `visible` has not three dimensions, is not boolean, or its images see different numbers of patches;
            or `index` is of another type or shape.
    """

    visible: Tensor
    index: Tensor = field(default=None)  # type: ignore[assignment]
    slots: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if self.index is None:
            object.__setattr__(self, "index", _visible_index(self.visible))
        elif self.index.dtype != torch.int64 or self.index.ndim != 2 or len(self.index) != len(self.visible):
            raise UserError(
                f"a mask's index is int64 (B, V) for visible (B, h, w); got {self.index.dtype} "
                f"{tuple(self.index.shape)} for {tuple(self.visible.shape)}"
            )
        counted = self.visible.flatten(1).cumsum(1, dtype=torch.int32).view(self.visible.shape) - 1
        object.__setattr__(self, "slots", counted.masked_fill(~self.visible, -1))

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w): the number of mask patches down and across."""
        return self.visible.shape[1], self.visible.shape[2]

    @property
    def patches(self) -> int:
        """L: how many patches an image has."""
        return self.visible.shape[1] * self.visible.shape[2]

    @property
    def visible_patches(self) -> int:
        """V: how many of them are seen."""
        return self.index.shape[1]

    @property
    def rows_and_columns(self) -> tuple[Tensor, Tensor]:
        """Where the seen patches lie in the grid: two (B, V) int64 tensors."""
        width = self.visible.shape[2]
        return self.index // width, self.index % width

    @staticmethod
    def everything(batch: int, h: int, w: int, *, device: torch.device | str = "cpu") -> "Mask":
        """All cells of `batch` grids are seen."""
        index = torch.arange(h * w, device=device).expand(batch, -1).contiguous()
        return Mask(torch.ones(batch, h, w, dtype=torch.bool, device=device), index)

    @property
    def hidden(self) -> "Mask":
        """The complement: what is hidden here is seen there."""
        seen = self.visible.flatten(1)  # (B, L)
        hidden_first = seen.to(torch.uint8).argsort(dim=1, stable=True)
        return Mask(~self.visible, hidden_first[:, : self.patches - self.visible_patches].contiguous())

    def at(self, positions: int) -> Tensor:
        """(B, 1, h*p, w*p) bool: what is seen of a map with `positions` p per side of a patch."""
        rows = self.visible.repeat_interleave(positions, dim=1)
        return rows.repeat_interleave(positions, dim=2)[:, None]

    def check(self, images: Tensor, patch_size: int) -> None:
        """Refuses images (B, C, H, W) that the mask is not for, and a mask that leaves nothing to learn.

        Raises:
            UserError: the images' sides are no multiples of `patch_size` pixels, the mask has another grid or batch,
                or it shows nothing or everything.
        """
        grid = patch_grid(images.shape[-2], images.shape[-1], patch_size)
        if self.grid != grid or len(self.visible) != len(images):
            raise UserError(
                f"the mask is for {len(self.visible)} images of {self.grid[0]}x{self.grid[1]} patches, "
                f"the batch has {len(images)} of {grid[0]}x{grid[1]}"
            )
        if self.visible_patches in (0, self.patches):
            raise UserError(
                f"the mask shows {self.visible_patches} of {self.patches} patches: "
                "at least one must be visible and one hidden to learn from; change mask_ratio or the image size"
            )

    def to(self, device: torch.device | str) -> "Mask":
        """The same mask on another device."""
        return Mask(self.visible.to(device), self.index.to(device))


class Masking(Protocol):
    """A masking strategy: looks at the images (at least at their shape) and says what is seen.

    `patch_size` is the side of one mask patch in pixels; a strategy is any callable object that has it. What it draws
    for an image follows from the image's seed, so that neither the rest of its batch nor the device it is on changes
    it; `uniform` makes random numbers of seeds.
    """

    patch_size: int

    def __call__(self, images: Tensor, seeds: Tensor | None = None) -> Mask:
        """images (B, C, H, W), seeds (B,) int64 on the same device; without seeds it draws some of its own."""
        ...


class RandomMask:
    """Hides a fixed share of the patches of each image, uniformly at random (paper section 3.1).

    Args:
        mask_ratio: share of the patches to hide, in [0, 1); `int(L * (1 - mask_ratio))` of L stay visible.
        patch_size: side of a mask patch in pixels, a multiple of 32.

    Raises:
        UserError: a value out of its bounds; when called, an image that is no multiple of the patch, or so small that
            no patch would stay visible.
    """

    def __init__(self, *, mask_ratio: float = 0.6, patch_size: int = 32) -> None:
        if not 0 <= mask_ratio < 1:
            raise UserError(f"mask_ratio={mask_ratio} is outside [0, 1): give the share to hide, such as 0.6")
        if patch_size < 32 or patch_size % 32:
            raise UserError(f"patch_size={patch_size} is not a multiple of 32, the network's stride: use 32 or 64")
        self.mask_ratio = mask_ratio
        self.patch_size = patch_size

    def visible_count(self, patches: int) -> int:
        """How many of `patches` stay visible.

        Raises:
            UserError: none would.
        """
        count = int(patches * (1 - self.mask_ratio))  # the original's expression, binary rounding and all
        if count < 1:
            raise UserError(
                f"mask_ratio={self.mask_ratio} leaves none of {patches} patches visible: "
                + (f"use a ratio below {1 - 1 / patches:.4g} or larger images" if patches > 1 else "use larger images")
            )
        return count

    def __call__(self, images: Tensor, seeds: Tensor | None = None) -> Mask:
        """images (B, C, H, W), seeds (B,) int64 -> Mask over the grid (H / patch_size, W / patch_size).

        Without seeds they are drawn from torch's global generator of the images' device.
        """
        batch = images.shape[0]
        h, w = patch_grid(images.shape[-2], images.shape[-1], self.patch_size)
        if seeds is None:
            seeds = torch.randint(2**63 - 1, (batch,), device=images.device)
        order = uniform(seeds, h * w).argsort(dim=1, stable=True)
        index = order[:, : self.visible_count(h * w)].sort(dim=1).values  # (B, V)
        visible = torch.zeros(batch, h * w, dtype=torch.bool, device=images.device).scatter_(1, index, True)
        return Mask(visible.view(batch, h, w), index)


def uniform(seeds: Tensor, count: int) -> Tensor:
    """Random numbers in [0, 1) that follow from seeds, the same on every device (Steele et al. 2014, SplitMix64).

    Args:
        seeds: (B,) int64.
        count: numbers per seed.

    Returns:
        (B, count) float32, multiples of 2^-24.
    """
    place = torch.arange(1, count + 1, device=seeds.device)
    z = seeds[:, None] + place * _signed(0x9E3779B97F4A7C15)  # (B, count); int64 wraps around
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(z, 40).to(torch.float32) / 2**24  # SplitMix64's last step changes lower bits only


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of an unsigned number."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(x: int) -> int:
    """The signed number of the same 64 bits."""
    return x - 2**64 if x >= 2**63 else x


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """(h, w): how many patches an image holds.

    Raises:
        UserError: a side is not a positive multiple of the patch.
    """
    for side in (height, width):
        if side < patch_size or side % patch_size:
            below = side // patch_size * patch_size
            choices = f"{below} or {below + patch_size}" if below > 0 else str(patch_size)
            raise UserError(
                f"image size {height}x{width} is not a multiple of the {patch_size}-pixel mask patch: "
                f"instead of {side} use {choices}"
            )
    return height // patch_size, width // patch_size


def _visible_index(visible: Tensor) -> Tensor:
    if visible.ndim != 3 or visible.dtype != torch.bool:
        raise UserError(
            f"a mask is a boolean tensor (B, h, w), True where seen; got {visible.dtype} {tuple(visible.shape)}"
        )
    counts = visible.flatten(1).sum(1)  # (B,)
    least, most = (int(count) for count in torch.aminmax(counts))
    if least != most:
        raise UserError(
            f"the images of a batch see different numbers of patches ({least} to {most}): every image must see as many"
        )
    return visible.flatten(1).nonzero()[:, 1].view(visible.shape[0], least)
