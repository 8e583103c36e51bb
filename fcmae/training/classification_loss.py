"""The loss of fine-tuning: cross-entropy, or binary cross-entropy where an image may have several labels."""

import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.errors import UserError


class ClassificationLoss(nn.Module):
    """Cross-entropy with label smoothing and class weights.

    Args:
        label_smoothing: share of each label that is spread over all classes.
        class_weights: (classes,) factors on the classes; with several labels per image, on their presence.
        multi_label: binary cross-entropy, each class by itself.

    Raises:
        UserError: a smoothing outside [0, 1), or with several labels per image.
    """

    class_weights: Tensor | None

    def __init__(self, *, label_smoothing: float, class_weights: Tensor | None, multi_label: bool) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing={label_smoothing} must be a share in [0, 1)")
        if multi_label and label_smoothing:
            raise UserError(f"label_smoothing={label_smoothing} needs one label per image: set label_smoothing=0")
        self.label_smoothing = label_smoothing
        self.multi_label = multi_label
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss, computed in float32.

        Args:
            logits: (B, classes).
            labels: (B,) int64, or (B, classes) shares or presences.
        """
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(logits.float(), labels, pos_weight=self.class_weights)
        losses = F.cross_entropy(
            logits.float(), labels, weight=self.class_weights, label_smoothing=self.label_smoothing, reduction="none"
        )
        return losses.mean()  # torch's own mean divides by the weights of the batch, which cancels them in small ones


def balanced_weights(counts: Tensor, images: int, *, multi_label: bool) -> Tensor:
    """Weights that make every class count the same, whatever its size: (classes,) float32.

    Args:
        counts: (classes,) training images of each class.
        images: training images in all.
        multi_label: then a class's presences count as much as its absences.
    """
    if multi_label:
        return ((images - counts).clamp(min=1) / counts).float()  # one that is always there still learns
    return (images / (len(counts) * counts)).float()
