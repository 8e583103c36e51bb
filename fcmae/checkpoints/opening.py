"""Files of weights opened without running anything that is in them."""

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fcmae.checkpoints.carried import CARRIED, read_carried
from fcmae.checkpoints.format import read_checkpoint
from fcmae.checkpoints.sharded import assemble, is_sharded
from fcmae.errors import UserError, in_a_line


def open_weights(file: Path) -> tuple[Any, dict[str, Any]]:
    """What a file holds, on the CPU, mapped from the disk where that is possible; and what it carries of its origin.

    Raises:
        UserError: it is truncated, no such file, holds more than plain data, or is not as torch writes it.
    """
    if is_sharded(file):
        content = read_checkpoint(file)
        return content | {"state_dict": assemble(content["state_dict"])}, {}
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_plain_data(file)


def _read_safetensors(file: Path) -> tuple[Any, dict[str, Any]]:
    """The tensors, and what one of our exports carries with them."""
    try:
        with safe_open(file, framework="pt") as opened:
            carried = read_carried((opened.metadata() or {}).get(CARRIED), file)
        return load_file(file), carried
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file} cannot be read, it is truncated or no safetensors file ({_reason(error)})") from error


def _read_plain_data(file: Path) -> tuple[Any, dict[str, Any]]:
    # Files of the authors and of timm hold their command line. Letting argparse.Namespace through runs nothing of a
    # file's choice: it has no __setstate__ or __reduce__ and takes no positional arguments, so a file can only set
    # attributes of a new one, to values that the same reader has let through. (One named __setstate__ would be called,
    # but the functions that get through may be called anyway.) Nothing here looks at them.
    try:
        zipped = zipfile.is_zipfile(file)
        if zipped:
            _check_zip(file)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
        return content, read_carried(content.get(CARRIED) if isinstance(content, dict) else None, file)
    except UserError:
        raise
    except pickle.UnpicklingError as error:  # torch's own message advises to load it all the same
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {found[1]}" if found else "or it is truncated"
        raise UserError(f"{file} holds more than tensors and plain data ({what}): give a state dict alone") from error
    except Exception as error:
        raise UserError(f"{file} cannot be read, it is truncated or no checkpoint ({_reason(error)})") from error


def _check_zip(file: Path) -> None:
    """torch stores its entries as they are. Compressed ones could be a few bytes that unpack to terabytes."""
    with zipfile.ZipFile(file) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        claimed = sum(entry.file_size for entry in archive.infolist())
    if packed or claimed > file.stat().st_size:
        what = f"{packed[0]} is compressed" if packed else f"its entries claim {claimed:,} bytes"
        raise UserError(f"{file} is a zip file as torch does not write it ({what}): it is damaged or made to harm")


def _reason(error: Exception) -> str:
    return f"{in_a_line(error):.120}"
