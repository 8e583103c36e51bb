"""What it takes to hand a trained network to another library."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from fcmae.inference.trained import Trained


class Conversion(ABC):
    """One direction out. It writes files, and says what the other library makes of images with them.

    Attributes:
        library: its name on a model card.
        keeps_classifier: whether a classifier goes with the network.
    """

    library: ClassVar[str]
    keeps_classifier: ClassVar[bool] = True

    @abstractmethod
    def check(self, trained: Trained) -> None:
        """Refuses a network that the other library cannot hold, before anything is written.

        Raises:
            UserError: says why, and what can be done.
        """

    @abstractmethod
    def write(self, trained: Trained, folder: Path) -> None:
        """Writes all files of the format into an empty folder."""

    @abstractmethod
    def outputs(self, folder: Path, images: Tensor) -> list[Tensor]:
        """From normalised images (B, C, H, W), what the other library computes with those files, read anew."""

    @abstractmethod
    def usage(self, name: str, trained: Trained) -> str:
        """Python lines that load the files with the other library alone.

        Args:
            name: the folder, or the hub's `user/name`.
            trained: what was written.
        """

    @torch.inference_mode()
    def expected(self, trained: Trained, images: Tensor) -> list[Tensor]:
        """What our network computes: logits (B, classes); without a classifier the last feature map."""
        net = trained.net
        return [net(images) if trained.class_names else net.forward_features(images)]
