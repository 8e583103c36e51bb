"""What of a run's configuration may travel with its weights: how it was trained, not where."""

import re
from pathlib import PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

_OF_THE_MACHINE = ("run_dir", "resume", "logger", "pictures", "save", "hydra", "experiment")
_PUBLIC = ("http", "https", "s3", "gs", "hf")  # addresses that mean the same everywhere
_ON_A_HUB = re.compile(r"hf-hub:[\w.-]+/[\w.-]+(@[\w./-]+)?|timm:[\w.-]+(@[\w./-]+)?", re.ASCII)
_BETWEEN = re.compile(r",(?![^{}]*\})|::")  # the places of a list; not the commas in {a,b}


def recipe(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what belongs to one machine, and with names in the place of paths.

    Weights are given away, and a path tells who trained them and where; an address may even hold a password, and a
    command anything. Of a path the last name stays, relative or not; of an address on the net its host and path.

    Args:
        config: of the run, resolved, as plain dictionaries.
    """
    kept = {key: value for key, value in config.items() if key not in _OF_THE_MACHINE}
    return {key: _without_places(value) for key, value in kept.items()}


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(entry) for entry in value]
    return _names(value) if isinstance(value, str) else value


def _names(text: str) -> str:
    """A text with names in the place of what may be paths, addresses or commands in it."""
    if _ON_A_HUB.fullmatch(text):
        return text
    text, pipe, _ = text.partition("pipe:")  # the rest is a command
    if "://" in text:  # secrets go before the list is taken apart, they may hold commas
        text = re.sub(r"[?#].*?(?=,[\w+.-]+:|$)", "", text, flags=re.DOTALL)
        text = re.sub(r"://[^/]*@", "://", text)
    if re.search(r"[/\\]|^~|^[A-Za-z]:", text):
        text = ",".join(_name(part) for part in _BETWEEN.split(text))
    return text + pipe


def _name(place: str) -> str:
    place = place.strip()
    if _ON_A_HUB.fullmatch(place):
        return place
    if "://" not in place:
        return "~" if place.startswith("~") and not re.search(r"[/\\]", place) else PureWindowsPath(place).name
    try:
        address = urlsplit(place)
        host = address.hostname or ""
        _ = address.port  # what is no number there may be a password
    except ValueError:
        return place.partition("://")[0] + "://"
    if address.scheme not in _PUBLIC:
        return PureWindowsPath(address.path).name
    return f"{address.scheme}://{host}{address.path}"
