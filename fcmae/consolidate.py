"""`python -m fcmae.consolidate checkpoint=outputs/pretrain/x out=FILE.ckpt`: a sharded checkpoint as one file."""

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from fcmae.checkpoints.format import newest_checkpoint, read_checkpoint
from fcmae.checkpoints.sharded import assemble, is_sharded
from fcmae.command_line.launch import run
from fcmae.errors import UserError
from fcmae.training.checkpoint_io import AtomicCheckpointIO


def consolidate(config: DictConfig) -> None:
    """Writes the checkpoint that a run on one device would have written.

    Raises:
        UserError: something that the user can mend; nothing is written then.
    """
    for name in ("checkpoint", "out"):
        if not isinstance(config[name], str):
            raise UserError(f"{name}={config[name]} must be text")
    folder, out = _sharded(Path(config.checkpoint)), Path(config.out)
    if out.exists():
        raise UserError(f"out={out} exists: name a new file")
    with Console(stderr=True).status("reading all ranks' files"):  # shown on terminals only
        checkpoint = assemble(read_checkpoint(folder))
        AtomicCheckpointIO().save_checkpoint(checkpoint, out)
    step, size = checkpoint["global_step"], out.stat().st_size / 1e6
    Console(highlight=False, soft_wrap=True).print(
        f"{out}: {folder.name} after {step} steps, in one file of {size:,.1f} MB", markup=False
    )


def _sharded(path: Path) -> Path:
    """The folder of a sharded checkpoint that a path means."""
    if path.is_dir() and not is_sharded(path):  # a run's
        newest = newest_checkpoint(path)
        if newest is None:
            raise UserError(f"{path} holds no checkpoint that can be read: give a run's folder or a sharded checkpoint")
        path = newest
    if path.is_file():
        raise UserError(f"{path} is one file already: it needs no consolidation")
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run's folder or a sharded checkpoint")
    return path


if __name__ == "__main__":
    run("consolidate", consolidate)
