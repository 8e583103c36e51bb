"""Continued pre-training: from weights of any make, with a new decoder that trains alone at first."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from fcmae.checkpoints.format import read_checkpoint
from fcmae.checkpoints.lineage import Lineage
from fcmae.checkpoints.load_autoencoder import load_autoencoder
from fcmae.checkpoints.load_into import AdaptChannels
from fcmae.checkpoints.weights import read_weights
from fcmae.errors import UserError
from fcmae.models.fcmae import FCMAE
from fcmae.training.optimization import AdamW, Factor


@dataclass(frozen=True)
class Start:
    """What a run of pre-training began with.

    Attributes:
        lineage: of its weights; empty from scratch.
        new_decoder: whether its decoder knew nothing.
        lines: to be said of it.
    """

    lineage: Lineage
    new_decoder: bool
    lines: tuple[str, ...] = ()


def start_from(
    init: str | None,
    model: FCMAE,
    *,
    run_dir: Path,
    earlier: Path | None,
    adapt_in_chans: AdaptChannels | None,
    strict: bool,
) -> Start:
    """Gives a model the weights that its run is to start from.

    Args:
        init: as for `read_weights`; None: from scratch.
        model: freshly made.
        run_dir: of the run, where it cannot start from.
        earlier: a checkpoint that the run goes on from, which has all that is needed; `init` may be gone by then.
        adapt_in_chans: see `load_into`.
        strict: see `load_autoencoder`.

    Raises:
        UserError: the weights cannot be read or do not fit.
    """
    if earlier is not None:
        said = read_checkpoint(earlier)["fcmae"]
        return Start(said.get("lineage", []), said.get("new_decoder", True))
    if init is None:
        return Start([], new_decoder=True)
    if run_dir.resolve() in (Path(str(init)).resolve(), *Path(str(init)).resolve().parents):
        raise UserError(
            f"init={init} is the run's own folder: give this run another run_name, or leave init out to go on with it"
        )
    weights = read_weights(init)
    report = load_autoencoder(model, weights, adapt_in_chans=adapt_in_chans, strict=strict)
    return Start(weights.descent(), not report.decoder, tuple(report.lines()))


@dataclass(frozen=True, kw_only=True)
class WarmStartAdamW(AdamW):
    """AdamW for an autoencoder that has learnt something: the decoder trains alone at first, then the encoder joins.

    Args:
        decoder_steps: optimiser steps for which the decoder trains alone; then the encoder begins, with a warm-up of
            its own. None: a twentieth of the run.
        encoder_lr_factor: the encoder's learning rate as a share of the decoder's.

    Raises:
        UserError: a value out of its bounds.
    """

    decoder_steps: int | None
    encoder_lr_factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_steps is not None and self.decoder_steps < 0:
            raise UserError(f"warm_start.decoder_steps={self.decoder_steps} must be a whole number from 0, or null")
        if not 0 <= self.encoder_lr_factor < math.inf:
            raise UserError(f"warm_start.encoder_lr_factor={self.encoder_lr_factor} must be a number from 0")

    @classmethod
    def of(cls, optim: AdamW, *, decoder_steps: int | None, encoder_lr_factor: float, new_decoder: bool) -> AdamW:
        """The same optimiser, warmly started. A decoder that is not new need not train alone, unless that is asked.

        Raises:
            UserError: it is another optimiser, which would have to start warmly.
        """
        steps = decoder_steps if new_decoder or decoder_steps is not None else 0
        if type(optim) is not AdamW:  # what else it does is not known here
            if steps == 0 and encoder_lr_factor == 1:
                return optim
            name = f"{type(optim).__module__}.{type(optim).__qualname__}"
            raise UserError(
                f"optim is {name}, and with init only optim=adamw can train the decoder alone at first: "
                "use that, or warm_start.decoder_steps=0 warm_start.encoder_lr_factor=1"
            )
        options = {field.name: getattr(optim, field.name) for field in fields(AdamW)}
        return cls(**options, decoder_steps=steps, encoder_lr_factor=encoder_lr_factor)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The decoder's and the encoder's parameters, twice: what is decayed and what is not."""
        encoder = {id(parameter) for name, parameter in model.named_parameters() if name.startswith("encoder.")}
        return [
            {**group, "params": part, "is_encoder": of_encoder, "lr_scale": scale}
            for group in super().groups(model)
            for of_encoder, scale in ((False, 1.0), (True, self.encoder_lr_factor))
            if (part := [parameter for parameter in group["params"] if (id(parameter) in encoder) == of_encoder])
        ]

    def factors(
        self, groups: Sequence[dict[str, Any]], *, peak: float, steps: int, steps_per_epoch: float
    ) -> list[Factor]:
        start = steps // 20 if self.decoder_steps is None else self.decoder_steps
        warmup_steps = self.warmup_epochs * steps_per_epoch
        if start and start + warmup_steps >= steps:
            raise UserError(
                f"warm_start.decoder_steps={start}, and the encoder's warm-up of {warmup_steps:g} steps after it, "
                f"leave nothing of a run of {steps} steps: make them shorter, or the run longer"
            )
        return [
            self._factor(peak=peak, steps=steps, warmup_steps=warmup_steps, start=start if group["is_encoder"] else 0.0)
            for group in groups
        ]
