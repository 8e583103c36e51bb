"""What is compared: our model on one or several engines, and the baselines, all with the same weights."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from fcmae.benchmark.dense import as_dense
from fcmae.benchmark.same_kernels import as_same_kernels
from fcmae.engines import Engine
from fcmae.errors import UserError
from fcmae.models.fcmae import FCMAE

# In the order in which they are measured and shown.
BASELINES = {"dense": as_dense, "dense compiled": as_dense, "same kernels": as_same_kernels}
OF_OTHER_FEATURES = "same kernels"  # sees everything, so its numbers are its own


def check_baselines(names: object) -> tuple[str, ...]:
    """The baselines that are asked for, in their order.

    Raises:
        UserError: one of them is unknown.
    """
    wanted = [names] if isinstance(names, str) else names
    if not isinstance(wanted, Sequence) or not set(wanted) <= set(BASELINES):
        raise UserError(f"baselines={names} must be a list of {', '.join(BASELINES)}, or [] for none")
    return tuple(name for name in BASELINES if name in wanted)


def build_variants(
    model: FCMAE, *, baselines: Sequence[str] = ("dense", "same kernels"), engines: Sequence[Engine] | None = None
) -> dict[str, FCMAE]:
    """The baselines first, then what is compared with them; all with the same weights, none of them shared.

    Args:
        model: is left as it is.
        baselines: keys of `BASELINES`; `same kernels` runs on the first engine.
        engines: one variant each, called like it; None: the model's own, called `packed`.
    """
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".grn." in name:  # a fresh GRN does nothing, so that an error in it would not show
                nn.init.normal_(parameter, std=0.1)
    ours = {"packed": model} if engines is None else {engine.name: _on(engine, model) for engine in engines}
    first = next(iter(ours.values()))
    return {name: BASELINES[name](first) for name in baselines} | ours


def _on(engine: Engine, model: FCMAE) -> FCMAE:
    model = copy.deepcopy(model)
    model.encoder.engine = model.decoder.engine = engine
    return model
