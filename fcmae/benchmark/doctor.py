"""The doctor: which engines work here, and do they compute what engine `torch` computes?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fcmae.engines import NAMES, Engine, get_engine
from fcmae.engines.auto import FASTEST
from fcmae.engines.check import errors
from fcmae.errors import UserError

TOLERANCES: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Finding:
    """What the doctor found.

    Attributes:
        name: of the engine.
        engine: None where it does not work.
        largest_errors: by type (`float32`, ...) the largest relative error of outputs and gradients.
        reason: why it cannot be used, or None if it can.
    """

    name: str
    engine: Engine | None
    largest_errors: Mapping[str, float]
    reason: str | None


def choose_engines(wanted: object, device: str, dtypes: Sequence[torch.dtype]) -> list[Finding]:
    """Examines the engines that are asked for.

    Args:
        wanted: a name, a list of names, or `all`: every engine; those that fail are left out by the caller.
        device: on which they are to work.
        dtypes: in which types of numbers.

    Raises:
        UserError: an engine asked for by name does not work here, or is off by more than the tolerance.
    """
    if wanted == "all":
        fastest = FASTEST.get(torch.device(device).type)  # first, since `same kernels` runs on the first
        others = sorted((name for name in NAMES if name != "auto"), key=lambda name: name != fastest)
        return [examine(name, device, dtypes) for name in others]
    names = [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(names, Sequence) or not names:
        raise UserError(f"engines={wanted} must be one engine, a list of them, or all: {', '.join(NAMES)}")
    findings = [examine(str(name), device, dtypes) for name in dict.fromkeys(names)]
    for finding in findings:
        if finding.reason is not None:
            raise UserError(finding.reason)
    return findings


def examine(name: str, device: str, dtypes: Sequence[torch.dtype]) -> Finding:
    """Compares an engine's outputs and gradients with engine `torch` in float64, see `fcmae.engines.check`."""
    largest: dict[str, float] = {}
    try:
        engine = get_engine(name)
        engine.check_device(torch.device(device))
        for dtype in dict.fromkeys(dtypes):
            result, error = max(errors(engine, device, dtype).items(), key=_not_a_number_first)
            largest[_short(dtype)] = error
            if not error <= TOLERANCES[dtype]:
                allowed = f"at most {TOLERANCES[dtype]:.0e} is allowed"
                raise UserError(
                    f"engine={name!r} is wrong in {_short(dtype)}: {result} is off by {error:.1e}, {allowed}"
                )
    except UserError as error:
        return Finding(name, None, largest, str(error))
    except Exception as error:  # whatever a compiler or a driver may come up with
        line = next(iter(str(error).splitlines()), "")
        return Finding(name, None, largest, f"engine={name!r} fails on {device}: {type(error).__name__}: {line}")
    return Finding(name, engine, largest, None)


def _not_a_number_first(item: tuple[str, float]) -> tuple[bool, float]:
    return item[1] != item[1], item[1]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
