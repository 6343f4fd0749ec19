"""A safetensors file that is never written: what is read of it comes straight from the arrays."""

import io
import os
from bisect import bisect_right
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from store.tensors import lay_out, schema_of
from store.weights import SHARD_METADATA


def _nothing() -> None:
    """Take no notice."""


class TensorFile(io.RawIOBase):
    """The file that these arrays would be; equal arrays give equal bytes.

    The arrays must not change as long as the file is in use. One that is not contiguous or not little-endian is copied.
    """

    def __init__(self, tensors: Mapping[str, npt.NDArray[Any]], *, on_read: Callable[[], None] = _nothing) -> None:
        """Lay the arrays out; `on_read` is called before each piece that is read, and ends the reading by raising."""
        super().__init__()
        self._on_read = on_read
        first, locations = lay_out(schema_of(tensors), SHARD_METADATA)
        self._pieces = [memoryview(first), *(_bytes_of(tensors[name]) for name in locations)]
        self._ends = list(accumulate(len(piece) for piece in self._pieces))
        self._position = 0

    @property
    def size(self) -> int:
        """Return the number of bytes."""
        return self._ends[-1]

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def seekable(self) -> bool:
        """Return that it can be read again."""
        return True

    def tell(self) -> int:
        """Return where the next byte is read."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to the offset and return it, counted from the beginning."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise ValueError(f"There is nothing before a file's beginning: {base + offset}.")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer, but for what is beyond the end; return the number of bytes."""
        self._on_read()
        target = memoryview(buffer).cast("B")
        filled = 0
        number = bisect_right(self._ends, self._position)
        while filled < len(target) and number < len(self._pieces):
            piece = self._pieces[number]
            start = self._position - (self._ends[number] - len(piece))
            block = piece[start : start + len(target) - filled]
            target[filled : filled + len(block)] = block
            filled += len(block)
            self._position += len(block)
            number += 1
        return filled


def _bytes_of(tensor: npt.NDArray[Any]) -> memoryview:
    stored = np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("<"))
    return stored.reshape(-1).view(np.uint8).data
