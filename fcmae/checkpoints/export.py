"""A trained network alone, in timm's names."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from fcmae.checkpoints.carried import CARRIED, carried
from fcmae.checkpoints.format import DESCRIPTION
from fcmae.files import atomic_writer, write_text


def export_network(net: nn.Module, file: Path, description: dict[str, Any]) -> None:
    """Writes the weights of timm's ConvNeXt to `file` and, beside it, `fcmae.json` (how it was made).

    A pre-trained encoder has no classifier; its final norm, which plays no part in pre-training, is there as ones and
    zeros: timm's strict loaders want it.

    Raises:
        UserError: it cannot be written; an earlier export is untouched.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    write_text(file.parent / DESCRIPTION, json.dumps(description, indent=2) + "\n")
    with atomic_writer(file) as opened:
        opened.write(save(weights, metadata={"format": "pt", CARRIED: carried(description)}))
