"""Where weights came from, and under which licence: carried by every checkpoint, from file to file."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fcmae.errors import UserError

Lineage = list[dict[str, Any]]
"""Files that training started from, the first one first: `source`, `sha256`, `license` (None: not known)."""

DROPPED = "license_dropped"
"""Set in an entry whose licence somebody has said to bind no longer."""

_NON_COMMERCIAL = re.compile(r"(^|[^a-z])nc([^a-z]|$)|non-?commercial", re.IGNORECASE)
"""In the names of licences that forbid commercial use."""


def origin(file: Path, *, source: str, license: str | None) -> dict[str, Any]:
    """One entry of a lineage.

    Args:
        file: what was read.
        source: what it is called; no path, which would tell of somebody's machine.
        license: its identifier, as on the hub (`cc-by-nc-4.0`, `apache-2.0`, ...); None if it is not known.
    """
    return {"source": source, "sha256": sha256(file), "license": license}


def inherited_license(lineage: Sequence[dict[str, Any]]) -> str | None:
    """The licence that binds what was trained from these: the first one that forbids commercial use, else the last.

    None where nothing is known to bind it, as with weights that were trained from scratch.
    """
    return binding([entry.get("license") for entry in lineage if not entry.get(DROPPED)])


def binding(licenses: Sequence[str | None]) -> str | None:
    """Of several licences the first one that forbids commercial use, else the last that is known."""
    known = [name for name in licenses if name]
    return next((name for name in known if _NON_COMMERCIAL.search(name)), known[-1] if known else None)


def settle_license(lineage: Lineage, *, wanted: str | None, drop: bool) -> tuple[str | None, Lineage]:
    """The licence to give weights away under, and their lineage, in which a dropped one is noted.

    Args:
        lineage: of the weights.
        wanted: None: the one that binds them.
        drop: give them another one all the same.

    Raises:
        UserError: another one is wanted, and not said to be dropped.
    """
    bound = inherited_license(lineage)
    if wanted is None or bound is None or wanted.lower() == bound.lower():
        return wanted or bound, lineage
    if not drop:
        source = next(entry["source"] for entry in lineage if entry.get("license") == bound)
        raise UserError(
            f"license={wanted}: these weights come from {source}, whose licence is {bound}; leave license out, or, if "
            "you have the right to, add drop_license=true, which the export records"
        )
    return wanted, [entry | {DROPPED: True} if entry.get("license") else entry for entry in lineage]


def sha256(file: Path) -> str:
    """The checksum of a file, or of a folder's files one after the other, in hexadecimal digits.

    Raises:
        UserError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for part in sorted(file.iterdir()) if file.is_dir() else [file]:
            with part.open("rb") as opened:
                while block := opened.read(2**20):
                    digest.update(block)
    except OSError as error:
        raise UserError(f"{file} cannot be read any more ({error.strerror}): type the same again") from error
    return digest.hexdigest()
