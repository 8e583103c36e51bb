"""One shard: an uncompressed tar in WebDataset's convention, whose samples are read by their place in it."""

import os
import re
import tarfile
from collections.abc import Collection, Iterator
from typing import BinaryIO, NamedTuple

from webdataset.tariterators import base_plus_ext

from fcmae.data.decoding import EXTENSIONS
from fcmae.data.shard_index import LABEL_LIMIT
from fcmae.errors import UserError

_BLOCK = tarfile.BLOCKSIZE
_META = re.compile(r"__[^/]*__($|/)")  # members about the shard itself, which WebDataset leaves out
_DIGITS = len(str(LABEL_LIMIT))
_AGAIN = "fetch or write the shard again"


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    start: int
    """Of its content, in bytes from the start of the tar."""
    size: int
    """In bytes."""


class TarShard:
    """The samples of one open shard.

    A sample is the consecutive members of one name up to the first dot after the last slash. Its picture is the first
    of them with an extension that `open_picture` knows, its class the number in `.cls`. As in WebDataset, the last
    extension of several (`.image.jpg`) says what a member is; one with a single extension goes before.

    Args:
        file: the open tar; closed with the shard.
        name: of the shard, for messages.

    Raises:
        UserError: the file is no uncompressed tar, or it ends too early.
    """

    def __init__(self, file: BinaryIO, *, name: str) -> None:
        self._file = file
        self._name = name
        self._samples: list[dict[str, Member]] = []  # by extension
        previous = None
        for member in _plain_members(file) or _members(file, name):
            key, extension = base_plus_ext(member.name)
            if key is None or _META.match(member.name):
                continue
            if key != previous:
                self._samples.append({})
                previous = key
            self._samples[-1].setdefault(extension.lower(), member)

    def __len__(self) -> int:
        return len(self._samples)

    def picture(self, place: int) -> tuple[str, bytes]:
        """(name of the file, what is in it).

        Raises:
            ValueError: the sample has none.
        """
        member = self._find(place, EXTENSIONS)
        if member is None:
            raise ValueError(f"no picture among {', '.join(each.name for each in self._samples[place].values())}")
        return member.name, self._read(member)

    def label(self, place: int) -> int | None:
        """The class; None if there is none, or it is no whole number from 0 to below `LABEL_LIMIT`."""
        member = self._find(place, (".cls",))
        text = b"" if member is None else self._read(member).strip()
        label = int(text) if text.isdigit() and len(text) <= _DIGITS else LABEL_LIMIT
        return label if label < LABEL_LIMIT else None

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _find(self, place: int, endings: Collection[str]) -> Member | None:
        sample = self._samples[place]
        for extension in sorted(sample, key=lambda extension: "." in extension):  # else in the order of the tar
            if f".{extension.rpartition('.')[2]}" in endings:
                return sample[extension]
        return None

    def _read(self, member: Member) -> bytes:
        self._file.seek(member.start)
        return self._file.read(member.size)


def _plain_members(file: BinaryIO) -> list[Member] | None:
    """The members of a tar of plain files with short names, several times as fast as tarfile; None for any other."""
    found: list[Member] = []
    end, place = os.fstat(file.fileno()).st_size, 0
    while place + _BLOCK <= end:
        file.seek(place)
        header = file.read(_BLOCK)
        if not any(header):
            return found
        kind, octal = header[156:157], header[124:135]
        if kind not in (tarfile.REGTYPE, tarfile.XHDTYPE) or header[257:262] != b"ustar" or not octal.isdigit():
            return None
        size = int(octal, 8)
        if kind == tarfile.REGTYPE:
            if header[345]:  # the name's first part
                return None
            name = header[:100].rstrip(b"\0").decode(errors="surrogateescape")
            found.append(Member(name, place + _BLOCK, size))
        else:
            words = file.read(size)
            if b" path=" in words or b" size=" in words or b" GNU." in words:
                return None  # says more of the next file than when it was written, which WebDataset's writer does
        place += _BLOCK + -(-size // _BLOCK) * _BLOCK
    return None


def _members(file: BinaryIO, name: str) -> Iterator[Member]:
    """The files of any uncompressed tar, with every kind of header that tarfile knows."""
    file.seek(0)
    last = "its start"
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                last = member.name
                if member.isreg():
                    yield Member(member.name, member.offset_data, member.size)
            end = tar.offset
    except tarfile.TarError as error:
        size = os.fstat(file.fileno()).st_size
        raise UserError(
            f"shard {name} is no whole, uncompressed tar ({error}): it ends at byte {size}, after {last}: {_AGAIN}"
        ) from error
    file.seek(end)  # tarfile takes whatever is no header for the end
    if file.read(_BLOCK) != bytes(_BLOCK):
        size = os.fstat(file.fileno()).st_size
        what = f"ends at byte {size}" if size < end + _BLOCK else f"holds no tar's header at byte {end} of {size}"
        raise UserError(f"shard {name} {what}, after {last}, without a tar's end mark: {_AGAIN}")
