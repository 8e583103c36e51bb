"""Runs of the command in this process, on a model that trains in a second."""

import contextlib
import io
import logging
import os
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
from PIL import Image

MODEL = ["model.depths=[1,1,1,1]", "model.dims=[8,16,32,64]", "model.decoder_dim=16"]
SMOKE = [*MODEL, "experiment=smoke", "data.image_size=64", "data.batch_size=8", "trainer.accelerator=cpu", "pictures=0"]
MICRO = ["+model=custom", *SMOKE]  # two epochs of four steps
RUN = Path("outputs/pretrain/smoke-custom")  # where MICRO runs


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """What follows `fcmae: `, after checking that there is one such line, the last one, and no traceback."""
        assert self.code == 2, self
        lines = self.err.splitlines()
        assert "Traceback" not in self.err
        assert [line for line in lines if line.startswith("fcmae: ")] == lines[-1:], self.err
        return lines[-1].removeprefix("fcmae: ")

    @property
    def only_error(self) -> str:
        """The same, where nothing but that line may have been said."""
        assert len(self.err.splitlines()) == 1, self.err
        assert not self.out, self.out
        return self.error


def pretrain(folder: Path, *arguments: str) -> Result:
    """`python -m fcmae.pretrain <arguments>` as if typed in `folder`, without starting another Python."""
    return command("pretrain", folder, *arguments)


def command(verb: str, folder: Path, *arguments: str) -> Result:
    """`python -m fcmae.<verb> <arguments>` likewise."""
    from fcmae.command_line.launch import run

    with typed(folder, verb, *arguments) as (out, err):
        try:
            run(verb, getattr(import_module(f"fcmae.{verb}"), verb))
            code = 0
        except SystemExit as exit:
            code = int(exit.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def typed(folder: Path, *words: str) -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """The process as if `words` had been typed in `folder`; gives (out, err), and leaves it as it was before."""
    root, out, err = logging.getLogger(), io.StringIO(), io.StringIO()
    handlers, level, directory = list(root.handlers), root.level, Path.cwd()
    with (
        mock.patch.object(sys, "argv", list(words)),
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        os.chdir(folder)
        try:
            yield out, err
        finally:
            os.chdir(directory)
            for signum, handler in before.items():
                signal.signal(signum, handler)
            for handler in set(root.handlers) - set(handlers):
                handler.close()
            root.handlers[:], root.level = handlers, level


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """All files below a folder, with their bytes and their times."""
    return {
        str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def write_images(folder: Path, count: int, size: tuple[int, int] = (40, 48)) -> list[Path]:
    """Some noisy PNG files, in the order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:03d}.png" for number in range(count)]
    numbers = np.random.default_rng(0)
    for file in files:
        Image.fromarray(numbers.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)
    return files
