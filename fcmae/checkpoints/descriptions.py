"""What our files say of themselves is read with suspicion: others may have written it."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fcmae.errors import UserError

LARGEST_SIDE = 8192
"""Pixels; more would ask for more memory than machines have."""


def check_description(said: Mapping[str, Any], file: Path) -> None:
    """Refuses a description with something in it that cannot be.

    Args:
        said: see `fcmae.checkpoints.format.describe`; what is missing is no fault.
        file: named in the error.

    Raises:
        UserError: names the first such entry.
    """
    for name, is_fine in _ENTRIES.items():
        if name in said and not is_fine(said[name]):
            told = re.sub(r"\s+", " ", repr(said[name]))
            raise UserError(
                f"{file} says of itself {name}={told:.60}, which cannot be: it is damaged, take another one"
            )


def is_license(value: object) -> bool:
    """Whether it is an identifier such as `cc-by-nc-4.0`."""
    return isinstance(value, str) and re.fullmatch(r"[\w.+-]{1,80}", value, re.ASCII) is not None


def _is_side(value: object) -> bool:
    return type(value) is int and 0 < value <= LARGEST_SIDE


def _is_size(value: object) -> bool:
    return _is_side(value) or (isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_side, value)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30  # no NaN either


def _are_numbers(value: object, least: float = -math.inf) -> bool:
    return isinstance(value, list | tuple) and all(_is_number(entry) and entry > least for entry in value)


def _is_input(value: object) -> bool:
    checks: dict[str, Callable[[Any], bool]] = {
        "image_size": _is_size,
        "in_chans": _is_side,
        "mean": _are_numbers,
        "std": lambda numbers: _are_numbers(numbers, least=0),
    }
    return isinstance(value, dict) and all(check(value[name]) for name, check in checks.items() if name in value)


def _is_origin(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("source"), str)
        and isinstance(value.get("sha256"), str)
        and (value.get("license") is None or is_license(value["license"]))
    )


def _is_best(value: object) -> bool:
    return value == {} or (
        isinstance(value, dict)
        and isinstance(value.get("metric"), str)
        and _is_number(value.get("value"))
        and type(value.get("step")) is int
    )


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_dictionary(value: object) -> bool:
    """Of what JSON can hold."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "fcmae": _is_text,
    "task": _is_text,
    "run_name": _is_text,
    "weights": _is_text,
    "model": _is_dictionary,
    "recipe": _is_dictionary,
    "versions": _is_dictionary,
    "steps": _is_dictionary,
    "input": _is_input,
    "lineage": lambda value: isinstance(value, list) and all(map(_is_origin, value)),
    "license": lambda value: value is None or is_license(value),
    "best": _is_best,
    "step": lambda value: type(value) is int,
    "class_names": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "multi_label": lambda value: isinstance(value, bool),
    "crop_pct": lambda value: value in ("auto", "warp") or (_is_number(value) and 0.05 <= value <= 1),
}
