"""Environments with a few packages and what they need: made of the installed ones, without a download."""

import importlib.metadata
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

Extras = frozenset[str]


class CleanEnvironment:
    """A Python that finds `packages`, what they require, and nothing else of what is installed here.

    Args:
        folder: where it is made; must not exist.
        packages: names of distributions.
    """

    def __init__(self, folder: Path, packages: list[str]) -> None:
        venv.EnvBuilder(symlinks=True).create(folder)
        self.python = folder / "bin" / "python"
        site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        self.packages = _closure(packages)
        for name in self.packages:
            for entry in _entries(importlib.metadata.distribution(name)):
                place = site / entry.name
                if not place.exists():  # several distributions may share a folder, such as nvidia
                    place.symlink_to(entry)

    def run(self, source: str, folder: Path) -> str:
        """What `source` prints, run in `folder` as a script; a failure is one of the test, with what it said."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COVERAGE"))}
        clean |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf")}
        done = subprocess.run(
            [self.python, "-c", source], cwd=folder, env=clean, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def lacks(self, folder: Path, *modules: str) -> None:
        """Checks that these cannot be imported."""
        source = f"import importlib.util as u; print([m for m in {list(modules)} if u.find_spec(m) is not None])"
        assert self.run(source, folder).strip() == "[]"


def _closure(packages: list[str]) -> set[str]:
    """Those packages and all that they require, here, in canonical names."""
    seen: set[tuple[str, Extras]] = set()
    waiting: list[tuple[str, Extras]] = [(canonicalize_name(name), frozenset()) for name in packages]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        waiting += [(theirs, more) for theirs, more in _requirements(name, extras) if (theirs, more) not in seen]
    return {name for name, _ in seen}


def _requirements(name: str, extras: Extras) -> Iterator[tuple[str, Extras]]:
    for line in importlib.metadata.requires(name) or []:
        requirement = Requirement(line)
        wanted = ["", *sorted(extras)]
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in wanted):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


def _entries(distribution: importlib.metadata.Distribution) -> set[Path]:
    """What a distribution has put directly into site-packages."""
    site = Path(str(distribution.locate_file("")))
    names = {file.parts[0] for file in distribution.files or []}
    return {site / name for name in names - {"..", "__pycache__"}}
