"""AdamW and its learning-rate schedule, for pre-training (paper table 8) and for fine-tuning (tables 9 to 13)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.convnext import ConvNeXt
from torch import nn
from torch.optim import Optimizer

from fcmae.errors import UserError
from fcmae.training.layer_decay import LayerDecay, finetune_groups

Factor = Callable[[int], float]
"""From the number of an optimiser step, from 0, to its learning rate as a share of the group's peak."""


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW with a linear warm-up and a half cosine, both per step.

    Args:
        base_lr: learning rate per 256 images of the effective batch.
        min_lr: where the cosine ends.
        weight_decay: of matrices and kernels; biases, norms, GRN and the mask token are not decayed.
        betas: of AdamW.
        warmup_epochs: epochs over which the rate rises linearly from 0.

    Raises:
        UserError: a negative value.
    """

    base_lr: float
    min_lr: float
    weight_decay: float
    betas: tuple[float, float]
    warmup_epochs: float

    def __post_init__(self) -> None:
        for name in ("base_lr", "min_lr", "weight_decay", "warmup_epochs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"optim.{name}={getattr(self, name)} must be a number from 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas={list(self.betas)} must be two numbers in [0, 1), such as [0.9, 0.95]")

    def peak_lr(self, effective_batch: int) -> float:
        """The linear scaling rule: base_lr * effective_batch / 256."""
        return self.base_lr * effective_batch / 256

    def lr_at(self, step: float, *, peak: float, steps: float, warmup_steps: float) -> float:
        """The learning rate of optimiser step `step` of `steps`, counted from 0 (as in the original's schedule)."""
        if step < warmup_steps:
            return peak * step / warmup_steps
        progress = (step - warmup_steps) / max(1.0, steps - warmup_steps)
        return self.min_lr + (peak - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def factors(
        self, groups: Sequence[dict[str, Any]], *, peak: float, steps: int, steps_per_epoch: float
    ) -> list[Factor]:
        """The schedule of each of the optimiser's groups of parameters."""
        warmup_steps = self.warmup_epochs * steps_per_epoch
        return [self._factor(peak=peak, steps=steps, warmup_steps=warmup_steps) for _ in groups]

    def _factor(self, *, peak: float, steps: int, warmup_steps: float, start: float = 0.0) -> Factor:
        def factor(step: int) -> float:
            if step < start or not peak:
                return 0.0
            return self.lr_at(step - start, peak=peak, steps=steps - start, warmup_steps=warmup_steps) / peak

        return factor

    def optimizer(self, model: nn.Module, lr: float, *, fused: bool = True) -> Optimizer:
        """torch's AdamW on the parameters that are trained; fused, a step is one pass over them."""
        groups = self.groups(model)
        for group in groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return torch.optim.AdamW(groups, lr=lr, betas=(self.betas[0], self.betas[1]), fused=fused)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """What is decayed and what is not."""
        return parameter_groups(model, self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class FinetuneAdamW(AdamW):
    """AdamW for a network that has learnt something: lower layers move more slowly, the head may go ahead.

    Args:
        layer_decay: factor on the rate from each layer, or group of layers, to the one below; 1 for the same rate.
        layer_decay_kind: `single`: a layer is a block; `group`: three blocks, for networks with 27 in the third stage.
        head_epochs: epochs for which only the head is trained; then the rest begins, with a warm-up of its own.

    Raises:
        UserError: a value out of its bounds.
    """

    layer_decay: float
    layer_decay_kind: LayerDecay
    head_epochs: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"optim.layer_decay={self.layer_decay} must be a number in (0, 1]")
        if not 0 <= self.head_epochs < math.inf:
            raise UserError(f"optim.head_epochs={self.head_epochs} must be a number from 0")

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """A group per layer, twice: what is decayed and what is not."""
        if not isinstance(model, ConvNeXt):
            raise UserError("optim=finetune is for fine-tuning a ConvNeXt: use optim=adamw")
        return finetune_groups(
            model,
            weight_decay=self.weight_decay,
            layer_decay=self.layer_decay,
            layer_decay_kind=self.layer_decay_kind,
        )

    def factors(
        self, groups: Sequence[dict[str, Any]], *, peak: float, steps: int, steps_per_epoch: float
    ) -> list[Factor]:
        warmup_steps, start = self.warmup_epochs * steps_per_epoch, self.head_epochs * steps_per_epoch
        return [
            self._factor(peak=peak, steps=steps, warmup_steps=warmup_steps, start=0.0 if group["is_head"] else start)
            for group in groups
        ]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What is decayed and what is not: nothing one-dimensional (biases, norms, GRN) and no mask token."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]

    def decayed(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim > 1 and not name.endswith("mask_token")

    return [
        {
            "params": [parameter for name, parameter in trained if decayed(name, parameter)],
            "weight_decay": weight_decay,
        },
        {"params": [parameter for name, parameter in trained if not decayed(name, parameter)], "weight_decay": 0.0},
    ]
