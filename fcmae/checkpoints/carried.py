"""Lineage and licence inside a file of weights, so that a copy without its folder still has them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from fcmae.checkpoints.descriptions import check_description
from fcmae.files import atomic_writer

CARRIED = "fcmae_origin"
"""The name in a safetensors file's metadata, or beside `model` in one of torch's."""


def carried(description: Mapping[str, Any]) -> str:
    """What of a description goes into a file: lineage and licence, as JSON."""
    return json.dumps({name: description.get(name) for name in ("lineage", "license") if description.get(name)})


def read_carried(text: Any, file: Path) -> dict[str, Any]:
    """The same back; nothing where there is nothing.

    Raises:
        UserError: it is there and cannot be.
    """
    if not isinstance(text, str):
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    check_description(found, file)
    return {name: found[name] for name in ("lineage", "license") if name in found}


def stamp(folder: Path, description: Mapping[str, Any]) -> None:
    """Puts lineage and licence into all files of weights in a folder that can hold them."""
    text = carried(description)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {"format": "pt"}
        content = save(load_file(file), metadata=metadata | {CARRIED: text})
        with atomic_writer(file) as written:
            written.write(content)
    for file in sorted(folder.glob("*.pth")):
        plain = torch.load(file, map_location="cpu", weights_only=True)
        with atomic_writer(file) as written:
            torch.save(plain | {CARRIED: text}, written)
