"""Compiles C for this machine at first use, and keeps the result in the user's cache.

Nothing here needs Python's or torch's headers: a library is loaded by ctypes. It holds instructions of the processor
at hand, so its name in the cache follows from what the compiler says that this processor can do: machines that share a
home folder do not disturb each other.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from fcmae.errors import UserError
from fcmae.files import user_cache

FLAGS = ("-std=gnu11", "-O3", "-shared", "-fPIC", "-fvisibility=hidden")
SECONDS = 120


@functools.cache
def load_library(source: Path, definition: str) -> ctypes.CDLL:
    """The library of a C file with `definition` defined.

    Raises:
        UserError: there is no compiler, it fails, or its product cannot be stored or loaded.
    """
    command = [*_compiler(), *FLAGS, f"-D{definition}"]
    content = hashlib.sha256(repr((source.read_text(), command, _target(*_compiler()))).encode()).hexdigest()
    name = f"{source.stem}-{definition.lower()}-{content[:16]}.so"
    try:
        return ctypes.CDLL(str(_compiled(command, source, user_cache() / name)))
    except OSError as error:  # the home may be read-only, full, or not to run programs from
        reasons = [str(error)]
    try:
        with tempfile.TemporaryDirectory(prefix="fcmae-") as folder:  # of this process alone; loaded, it may vanish
            return ctypes.CDLL(str(_compiled(command, source, Path(folder, name))))
    except OSError as error:
        reasons.append(str(error))
    raise UserError(
        f"a compiled {source.name} can be neither kept nor loaded ({'; '.join(reasons)}): set XDG_CACHE_HOME to a "
        "folder where you may write and run programs"
    )


def _compiler() -> list[str]:
    """$CC, else the system's compiler."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    for name in names:
        command = shlex.split(name)
        if shutil.which(command[0]):
            return command
    raise UserError(
        f"there is no C compiler ({', '.join(names)}) to build it with: install gcc or clang, or name one in CC"
    )


@functools.cache
def _target(*compiler: str) -> tuple[tuple[str, ...], str]:
    """The flags for this very processor, and all that the compiler then knows of it and of itself."""
    for flags in (("-march=native",), ("-mcpu=native",), ()):
        try:
            macros = _run([*compiler, *flags, "-dM", "-E", "-x", "c", os.devnull])
        except UserError as error:
            reason = error
        else:
            return flags, macros
    raise reason


def _compiled(command: list[str], source: Path, path: Path) -> Path:
    """`path`, after compiling it if it is not there yet."""
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # processes may do this at the same time
            product = Path(folder, path.name)
            flags, _ = _target(*_compiler())
            _run([*command, *flags, "-o", str(product), str(source), "-lm"])
            product.replace(path)
    return path


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"`{shlex.join(command)}` does not run: {error}") from error
    if done.returncode:
        lines = (
            [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no word"]
        )
        raise UserError(f"`{shlex.join(command)}` failed: {lines[0]}")
    return done.stdout
