"""The pre-trained encoder alone, in timm's names."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save

from fcmae.files import atomic_writer, write_text
from fcmae.models.encoder import Encoder


def export_encoder(encoder: Encoder, folder: Path, description: dict[str, Any]) -> Path:
    """Writes `encoder.safetensors` (timm's ConvNeXt without classifier) and `config.json` (how it was made).

    The final norm, which plays no part in pre-training, is there as ones and zeros: timm's strict loaders want it.

    Returns:
        The path of the weights.

    Raises:
        UserError: it cannot be written; an earlier export is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in encoder.net.state_dict().items()}
    write_text(folder / "config.json", json.dumps(description, indent=2) + "\n")
    with atomic_writer(folder / "encoder.safetensors") as file:
        file.write(save(weights, metadata={"format": "pt"}))
    return folder / "encoder.safetensors"
