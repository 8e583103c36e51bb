"""A trained network alone, in timm's names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from fcmae.checkpoints.carried import CARRIED, carried
from fcmae.checkpoints.format import DESCRIPTION
from fcmae.files import atomic_writer, write_text


def export_network(weights: Mapping[str, Tensor], file: Path, description: dict[str, Any]) -> None:
    """Writes the state dict of timm's ConvNeXt to `file` and, beside it, `fcmae.json` (how it was made).

    A pre-trained encoder has no classifier; its final norm, which plays no part in pre-training, is there as ones and
    zeros: timm's strict loaders want it.

    Raises:
        UserError: it cannot be written; an earlier export is untouched.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    write_text(file.parent / DESCRIPTION, json.dumps(description, indent=2) + "\n")
    with atomic_writer(file) as opened:
        opened.write(save(tensors, metadata={"format": "pt", CARRIED: carried(description)}))
