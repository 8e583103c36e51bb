"""A folder that is being filled with shards: what is done is written down, so that a second start goes on."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fcmae.data.shard_index import INDEX, Shard, write_index
from fcmae.data.shard_writer import Packed
from fcmae.errors import UserError
from fcmae.files import write_text


class ShardFolder:
    """The shards of a packing, below one folder.

    Args:
        path: the folder, made if it is not there.
        parameters: what the shards follow from; a packing with others is refused.

    Attributes:
        packed: the shards that are finished, by file.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """

    def __init__(self, path: Path, parameters: Mapping[str, Any]) -> None:
        self.path = path
        self._record = path / "packing.jsonl"
        earlier, lines = _read(self._record) if self._record.is_file() else ({}, [])
        self._check(earlier, parameters)
        self.packed = {packed.file: packed for packed in _finished(lines, path)}
        make_folder(path)
        for temporary in path.glob("*/.*.tmp"):  # of a packing that was killed
            temporary.unlink()
        kept = [json.dumps(parameters), *(_line(packed) for packed in self.packed.values())]
        write_text(self._record, "".join(f"{line}\n" for line in kept))

    @staticmethod
    @contextlib.contextmanager
    def locked(path: Path) -> Iterator[None]:
        """Refuses a second packing into the same folder at the same time.

        Raises:
            UserError: there is one, or the folder cannot be made.
        """
        make_folder(path)
        try:
            lock = FileLock(path / ".lock", timeout=0)
            with lock:
                yield
        except Timeout as error:
            raise UserError(f"out={path} is being filled by another process: wait for it, or name another") from error

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(sample id, reason) of images that could not be read, in the order of the shards."""
        return [entry for _, packed in sorted(self.packed.items()) for entry in packed.skipped]

    def add(self, packed: Packed) -> None:
        """Writes down that a shard is finished."""
        self.packed[packed.file] = packed
        with self._record.open("a", encoding="utf-8") as file:
            file.write(_line(packed) + "\n")

    def check_skipped(self, most: float) -> None:
        """Stops when more images than `most` could not be read.

        Raises:
            UserError: says so.
        """
        if len(self.skipped) > most:
            raise UserError(
                f"{len(self.skipped)} images cannot be read, more than data.max_broken allows: see "
                f"{self.list_skipped()}, then mend or remove them and name another out, or raise data.max_broken"
            )

    def list_skipped(self) -> Path:
        """Writes the images that could not be read to `skipped.jsonl`."""
        listed = self.path / "skipped.jsonl"
        lines = (json.dumps({"id": name, "reason": reason}) for name, reason in self.skipped)
        write_text(listed, "".join(f"{line}\n" for line in lines))
        return listed

    def finish(self, part: str, class_names: Sequence[str]) -> None:
        """Writes the index of one part's shards."""
        shards = [packed.shard for file, packed in sorted(self.packed.items()) if file.startswith(f"{part}/")]
        write_text(self.path / part / INDEX, write_index(shards, class_names))

    def _check(self, earlier: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
        others = [path for path in self.path.rglob("*") if path.name != ".lock"] if not earlier else []
        if others:
            raise UserError(f"out={self.path} is not empty, and holds no packing to go on with: name another folder")
        for name, value in parameters.items() if earlier else ():
            if earlier.get(name) != value:
                raise UserError(
                    f"out={self.path} was begun with {name}={earlier.get(name)}, not {value}: name another folder, or "
                    "delete this one"
                )


def make_folder(path: Path) -> None:
    """Makes a folder below `out`, unless it is there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: no folder can be made at {path} ({error.strerror}): name another one") from error


def _read(record: Path) -> tuple[dict[str, Any], list[str]]:
    """(parameters of the packing that was begun, a line for each shard)."""
    try:
        first, *lines = record.read_text(encoding="utf-8").splitlines() or ["{}"]
        parameters = json.loads(first)
    except ValueError:
        parameters = None
    if not isinstance(parameters, dict):
        raise UserError(f"{record} is no record of a packing: name another out, or delete {record.parent}")
    return parameters, lines


def _line(packed: Packed) -> str:
    return json.dumps({"file": packed.file, "shard": packed.shard._asdict(), "skipped": packed.skipped})


def _finished(lines: Sequence[str], path: Path) -> Iterator[Packed]:
    """The shards that are there as they were written down."""
    for line in lines:
        # A line cut short by a kill or changed by hand, a shard that was removed.
        with contextlib.suppress(ValueError, TypeError, KeyError, OSError):
            entry = json.loads(line)
            shard = Shard(**entry["shard"])
            if (path / entry["file"]).stat().st_size == shard.size:
                yield Packed(entry["file"], shard, [(name, reason) for name, reason in entry["skipped"]])
