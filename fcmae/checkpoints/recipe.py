"""What of a run's configuration may travel with its weights: how it was trained, not where."""

from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

_OF_THE_MACHINE = ("run_dir", "resume", "logger", "pictures", "save", "hydra", "experiment")


def recipe(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what belongs to one machine, and with names in the place of paths.

    Weights are given away, and a path tells who trained them and where; an address may even hold a password.

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
    if not isinstance(value, str):
        return value
    if "://" in value:
        address = urlsplit(value)
        return f"{address.scheme}://{address.hostname or ''}{address.path}"
    is_path = value.startswith(("/", "~", "./", "../")) or "\\" in value or value[1:3] == ":/"
    return PurePath(value.replace("\\", "/")).name if is_path else value
