"""An export, from a trained network to a folder that is there whole and proven, or not at all."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fcmae
from fcmae.checkpoints.carried import stamp
from fcmae.checkpoints.format import DESCRIPTION, FORMAT
from fcmae.checkpoints.lineage import Lineage, settle_license
from fcmae.checkpoints.names import Size, has_grn
from fcmae.conversion.card import Facts, model_card
from fcmae.conversion.comparison import TOLERANCE, Difference, difference, photographs
from fcmae.conversion.conversion import Conversion
from fcmae.errors import UserError
from fcmae.inference.trained import Trained


@dataclass(frozen=True, kw_only=True)
class Export:
    """What became of an export.

    Attributes:
        folder: where it is.
        library: that has loaded it, with its version.
        difference: between its numbers and ours.
        license: under which it is given away, if that is known.
    """

    folder: Path
    library: str
    difference: Difference
    license: str | None

    def lines(self) -> list[str]:
        """The same for people."""
        files = [file for file in sorted(self.folder.rglob("*")) if file.is_file()]
        told = ", ".join(f"{file.relative_to(self.folder)} ({_size(file.stat().st_size)})" for file in files)
        return [
            f"loaded by {self.library}: {self.difference}",
            f"licence: {self.license or 'none is stated; name yours with license='}",
            f"written: {self.folder}: {told}",
        ]


def check_out(out: Path) -> None:
    """Refuses a place that holds something already.

    Raises:
        UserError: says so.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} holds something already: name a new folder, or empty it first")
    if out.is_dir() and (out.is_mount() or out.resolve() == Path.cwd()):
        raise UserError(
            f"out={out} is a place that cannot be replaced: name a new folder in it, such as {out / 'export'}"
        )
    for folder in out.parents:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"out={out} cannot be made, {folder} is a file: name another folder")


def convert(
    trained: Trained,
    conversion: Conversion,
    out: Path,
    *,
    to: str,
    name: str,
    license: str | None,
    drop_license: bool,
    progress: Callable[[str], None],
) -> Export:
    """Writes `trained` into the folder `out`, loads it with the other library, compares, and adds a model card.

    Args:
        trained: the network.
        conversion: to the other library.
        out: does not exist yet, or is empty.
        to: what the conversion is called.
        name: under which the card loads the export: a folder, or the hub's `user/name`.
        license: of the export; None: the one that binds its weights.
        drop_license: give another one than that.
        progress: told what is being done.

    Raises:
        UserError: it cannot be written, the other library cannot hold it, or computes something else. Nothing is left.
    """
    check_out(out)
    conversion.check(trained)
    license, lineage = settle_license(trained.source.descent(), wanted=license, drop=drop_license)
    with _folder_for(out) as folder:
        progress(f"writing {out}")
        conversion.write(replace(trained, source=replace(trained.source, license=license)), folder)
        given = trained if conversion.keeps_classifier else replace(trained, class_names=(), multi_label=False)
        about = description(given, lineage=lineage, license=license)
        stamp(folder, about)
        progress(f"comparing with {conversion.library}")
        images = photographs(trained.preparation)
        found = difference(conversion.expected(trained, images), conversion.outputs(folder, images), images)
        library = f"{conversion.library} {_version(conversion.library)}".strip()
        if not found.is_rounding:
            raise UserError(
                f"{library} computes something else from what was written: {found}, more than {TOLERANCE:g} of them; "
                "nothing is left of the export. Please report this, with the versions of both packages"
            )
        facts = Facts(
            to=to,
            name=name,
            library=library,
            difference=str(found),
            license=license,
            lineage=lineage,
            exported=out.name,
        )
        (folder / DESCRIPTION).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(given, conversion, facts, about), encoding="utf-8")
    return Export(folder=out, library=library, difference=found, license=license)


def description(trained: Trained, *, lineage: Lineage, license: str | None) -> dict[str, Any]:
    """What an export says of itself: what its checkpoint did, or, of others' files, what is known."""
    weights, preparation = trained.net.state_dict(), trained.preparation
    size = Size.of(weights)
    known: dict[str, Any] = {
        "task": "classification" if trained.class_names else "pretraining",
        "model": {
            "size": size.name,
            "depths": list(size.depths),
            "dims": list(size.dims),
            "in_chans": preparation.in_chans,
            "use_grn": has_grn(weights),
        },
    }
    said = dict(trained.source.description or {}) if trained.source.ours else known
    if said.get("task") == "classification":
        said |= {"class_names": list(trained.class_names), "multi_label": trained.multi_label}
    return said | {
        "format": FORMAT,
        "fcmae": said.get("fcmae", fcmae.__version__),
        "input": {
            "image_size": list(preparation.image_size),
            "in_chans": preparation.in_chans,
            "mean": list(preparation.mean),
            "std": list(preparation.std),
        },
        "crop_pct": preparation.crop_pct,
        "weights": "moving average" if trained.source.average else "network",
        "lineage": lineage,
        "license": license,
    }


@contextlib.contextmanager
def _folder_for(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that becomes it when the block ends well, and vanishes when it does not."""
    with _making(out):
        there = next(folder for folder in out.absolute().parents if folder.is_dir())
    folder = there / f".{out.name}.{secrets.token_hex(8)}"  # known before it is there: a signal may come just then
    try:
        with _making(out):
            folder.mkdir(0o700)
        yield folder
        for file in folder.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777 & ~_umask())
        folder.replace(out)  # takes the place of an empty folder too
    except OSError as error:
        raise UserError(
            f"cannot write out={out}: {error.strerror or error}; free space or mend permissions there"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _making(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"out={out} cannot be made: {error.strerror}; name another folder") from error


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def _size(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
