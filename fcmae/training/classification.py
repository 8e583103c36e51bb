"""The Lightning module of fine-tuning and linear probing."""

import logging
from pathlib import Path
from typing import Any

import torch
from timm.models.convnext import ConvNeXt
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from fcmae.data.source import Batch
from fcmae.evaluation.classification import ClassificationMetrics
from fcmae.training.batch_augment import BatchAugment
from fcmae.training.classification_loss import ClassificationLoss
from fcmae.training.module import TrainingModule
from fcmae.training.optimization import AdamW

log = logging.getLogger(__name__)


class ClassificationModule(TrainingModule):
    """Trains a classifier on labelled images.

    Args:
        net: timm's ConvNeXt with a classifier.
        optim: optimiser and schedule.
        loss: of logits and labels.
        batch_augment: what becomes of a training batch.
        ema: the moving average of the weights, validated and saved beside them; None for none.
        balanced: every class counts the same for the best checkpoint, whatever its size; with one class per image.
        linear: train the last layer alone, on the features of the unchanged network.
        seed: of batch augmentation and drop path.
        description: how the model and its input are made, as plain data; goes into every checkpoint.
    """

    instead_of_demonstration = "For your own images leave data=digits out and add data.path=DIR, a folder per class."

    def __init__(
        self,
        *,
        net: ConvNeXt,
        optim: AdamW,
        loss: ClassificationLoss,
        batch_augment: BatchAugment,
        ema: ModelEmaV3 | None,
        balanced: bool,
        linear: bool,
        seed: int,
        description: dict[str, Any],
    ) -> None:
        super().__init__(optim=optim, seed=seed, description=description)
        self.net = net
        self.criterion = loss
        self.batch_augment = batch_augment
        self.ema = ema
        self.balanced = balanced
        self.linear = linear
        if linear:
            net.requires_grad_(False)
            net.head.fc.requires_grad_(True)
        self.num_classes: int = net.num_classes
        names = ["val", "val_ema"] if ema is not None else ["val"]
        self.metrics = nn.ModuleDict(
            {name: ClassificationMetrics(self.num_classes, multi_label=loss.multi_label) for name in names}
        )
        self.train()  # Lightning starts with the modes that it finds

    @property
    def trained(self) -> nn.Module:
        return self.net

    @property
    def networks(self) -> list[nn.Module]:
        return [self.net] if self.ema is None else [self.net, self.ema.module]

    @property
    def best_by(self) -> list[str]:
        """The metrics by which a checkpoint is the best."""
        kind = "map" if self.criterion.multi_label else "balanced_accuracy" if self.balanced else "acc1"
        return [f"{name}_{kind}" for name in self.metrics]

    def compile_network(self) -> None:
        """In place, so that the names of the weights stay timm's."""
        self.net.compile()

    def report(self) -> list[str]:
        counts = [sum(p.numel() for p in self.net.parameters() if p.requires_grad or not only) for only in (0, 1)]
        lines = [f"model: {counts[0] / 1e6:.1f} M parameters, {counts[1] / 1e6:.3g} M of them trained"]
        if self.balanced and not self.criterion.multi_label:
            lines.append("best.ckpt: the one with the highest balanced accuracy, not top-1")
        return lines

    def train(self, mode: bool = True) -> "ClassificationModule":
        """A network that is not trained has no drop path either."""
        super().train(mode)
        self.net.train(mode and not self.linear)
        if self.ema is not None:
            self.ema.eval()
        return self

    def on_fit_start(self) -> None:
        """Warns of a moving average that has no time to move."""
        steps = int(self.trainer.estimated_stepping_batches)
        if self.ema is not None and not self.ema.use_warmup and self.ema.decay**steps > 0.1:
            log.warning(
                "the moving average keeps %.0f %% of the weights that training starts with: ema.decay=%g is slow for "
                "%d steps; lower it, or add ema.warmup=true",
                100 * self.ema.decay**steps,
                self.ema.decay,
                steps,
            )

    def example(self, images: Tensor) -> Batch:
        shape = (len(images), self.num_classes) if self.criterion.multi_label else (len(images),)
        kind = torch.float32 if self.criterion.multi_label else torch.int64
        return super().example(images)._replace(labels=torch.zeros(shape, dtype=kind, device=images.device))

    def loss(self, batch: Batch) -> Tensor:
        """The loss of an augmented batch."""
        assert batch.labels is not None
        images, labels = self.batch_augment(batch.images, batch.labels, self.num_classes)
        return self.criterion(self.net(images), labels)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step of the optimiser, and of the moving average after it."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            # With a constant decay the average starts at the first step, as in the original code.
            self.ema.update(self.net, step=self.global_step + 1 if self.ema.use_warmup else None)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collects what the weights, and their average, make of held-out images."""
        networks = {"val": self.net} | ({"val_ema": self.ema.module} if self.ema is not None else {})
        assert batch.labels is not None
        known = (batch.labels >= 0).view(len(batch.labels), -1).all(1)  # the others could not be read
        known &= not batch.surplus
        for name, network in networks.items():
            self.metrics[name].update(network(batch.images)[known].float(), batch.labels[known])

    def on_validation_epoch_end(self) -> None:
        for name, metrics in self.metrics.items():
            values = metrics.summary()
            self.log_dict({f"{name}_{key}": value for key, value in values.items()})
            metrics.reset()

    def validation_line(self) -> str:
        metrics, parts = self.trainer.callback_metrics, []
        for name in self.metrics:
            if self.criterion.multi_label:
                quality = f"mean average precision {float(metrics[f'{name}_map']):.4f}"
            else:
                top1, balanced = (float(metrics[f"{name}_{key}"]) for key in ("acc1", "balanced_accuracy"))
                quality = f"top-1 {top1:.2%}, balanced accuracy {balanced:.2%}"
            parts.append(f"{quality}, loss {float(metrics[f'{name}_loss']):.4f}")
        return "validation " + "; moving average of the weights: ".join(parts)

    def export(self, folder: Path) -> None:
        """Writes `model.safetensors`, in timm's names: the moving average where there is one."""
        net = self.net if self.ema is None else self.ema.module
        weights = {"weights": "network" if self.ema is None else "moving average"}
        self.export_weights(net, folder / "model.safetensors", self.described | weights)
