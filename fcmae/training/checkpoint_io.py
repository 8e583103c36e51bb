"""How Lightning's checkpoints reach the disk and come back."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from fcmae.checkpoints.sharded import assemble, is_sharded, read_sharded, remove
from fcmae.files import atomic_writer


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint writer, atomic down to the disk, and a reader that does not unpickle."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes `checkpoint` to `path`.

        Raises:
            UserError: it cannot be written; earlier checkpoints are untouched.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if Path(path).is_dir():  # a sharded one that is incomplete, or it would have been gone on from
            remove(Path(path))
        with atomic_writer(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads `path`, plain data only; a sharded one as a whole."""
        if is_sharded(Path(path)):
            return dict(assemble(read_sharded(Path(path))))
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        return checkpoint
