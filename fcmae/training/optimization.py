"""AdamW and the learning-rate schedule of masked-autoencoder pre-training (paper table 8)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fcmae.errors import UserError


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

    def lr_at(self, step: int, *, peak: float, steps: int, warmup_steps: float) -> float:
        """The learning rate of optimiser step `step` of `steps`, counted from 0 (as in the original's schedule)."""
        if step < warmup_steps:
            return peak * step / warmup_steps
        progress = (step - warmup_steps) / max(1.0, steps - warmup_steps)
        return self.min_lr + (peak - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def optimizer(self, model: nn.Module, lr: float, *, fused: bool = True) -> Optimizer:
        """torch's AdamW on the parameters that are trained, in two groups; fused, a step is one pass over them."""
        groups = parameter_groups(model, self.weight_decay)
        return torch.optim.AdamW(groups, lr=lr, betas=(self.betas[0], self.betas[1]), fused=fused)


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
