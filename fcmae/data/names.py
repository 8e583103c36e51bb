"""Many names in little memory."""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import overload

import numpy as np


class Names(Sequence[str]):
    """A fixed sequence of strings, held as their bytes and where each begins.

    A list of 14 million paths takes gigabytes, and every worker process comes to hold its own copy: to read a Python
    object is to write its reference count. This takes the bytes of the paths, and the processes share them.

    Args:
        names: file names may hold bytes that are no UTF-8, as Python has them (surrogate escapes).
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._bytes = b"".join(encoded)
        self._ends = np.fromiter(accumulate(map(len, encoded)), dtype=np.int64, count=len(encoded))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # from the end, where negative; an IndexError, where there is none
        start = self._ends[number - 1] if number else 0
        return self._bytes[start : self._ends[number]].decode("utf-8", "surrogateescape")
