"""Write a multipart body piece by piece: small fields first, then one file of known size. Source: RFC 7578."""

import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import InvalidInput, NotFound
from store.blobs import copy_hashed

PIECE_BYTES = 1 << 18  # what is sent at a time: a send has to end within the timeout, on slow lines too

_NOT_IN_A_NAME = re.compile(r'[\x00-\x1f\x7f"\\]')
_NAME_CHARACTERS = 200


class SourceFailedError(Exception):
    """What was to be sent could not be read."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason  # the error of whoever was to give it


class MultipartBody:
    """Some fields and a file; can be sent again when the file can be read again."""

    def __init__(
        self,
        fields: Mapping[str, Any],  # None is left out; what is no text is written as JSON
        source: "Source",
    ) -> None:
        boundary = secrets.token_hex(16)
        self._head = b"".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + _text(value) + b"\r\n"
            for name, value in fields.items()
            if value is not None
        )
        name = _NOT_IN_A_NAME.sub("_", source.name)[-_NAME_CHARACTERS:]
        self._head += (
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode("utf-8", "replace")
        self._tail = f"\r\n--{boundary}--\r\n".encode()
        self._source = source
        self.size = source.size
        self.headers = {
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Content-Length": str(len(self._head) + source.size + len(self._tail)),
        }

    def __iter__(self) -> Iterator[bytes]:
        """Yield the body's pieces; raise SourceFailedError when the file cannot be read or has another size."""
        yield self._head
        left = self._source.size
        try:
            for block in self._source.blocks():
                left -= len(block)
                if left < 0:
                    break
                view = memoryview(block)
                for start in range(0, len(view), PIECE_BYTES):
                    yield bytes(view[start : start + PIECE_BYTES]) if len(view) > PIECE_BYTES else block
            if left:
                raise InvalidInput("The file changed while it was sent; send it again when nothing writes to it.")
        except Exception as error:  # an OSError of ours must not look like one of the connection
            raise SourceFailedError(error) from error
        yield self._tail


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A file that can be read more than once."""

    blocks: Callable[[], Iterator[bytes]]  # its bytes, from the beginning at each call
    size: int  # bytes
    name: str  # without folders


@contextmanager
def opened(file: str | Path | BinaryIO) -> Iterator[Source]:
    """Lend the file, given by its path or open; an open one is read from where it stands.

    A stream without a size, as a pipe is, is copied to a temporary file first. Raise NotFound or InvalidInput for what
    cannot be read.
    """
    with ExitStack() as stack:
        if isinstance(file, str | Path):
            own = stack.enter_context(_open_path(Path(file)))
            source = Source(blocks=_blocks_of(own, 0), size=os.fstat(own.fileno()).st_size, name=Path(file).name)
        elif not isinstance(getattr(file, "read", lambda count: "")(0), bytes):
            raise InvalidInput("The file is neither a path nor open for bytes; give a path, or open it with mode 'rb'.")
        elif file.seekable():
            start = file.tell()
            size = file.seek(0, os.SEEK_END) - start
            source = Source(blocks=_blocks_of(file, start), size=size, name=_name_of(file))
        else:
            spooled = stack.enter_context(tempfile.TemporaryFile(buffering=0))
            source = Source(blocks=_blocks_of(spooled, 0), size=copy_hashed(file, spooled).size, name=_name_of(file))
        yield source


def _open_path(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        raise NotFound(f"There is no file {path}; check its name.") from None
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} cannot be read ({error}); name a file that you may read.") from error


def _name_of(file: BinaryIO) -> str:
    name = getattr(file, "name", "")  # a number for a file that was opened by its descriptor
    return Path(name).name if isinstance(name, str) and name else "file"


def _blocks_of(file: BinaryIO, start: int) -> Callable[[], Iterator[bytes]]:
    def blocks() -> Iterator[bytes]:
        file.seek(start)
        while block := file.read(PIECE_BYTES):
            yield block

    return blocks


def _text(value: Any) -> bytes:
    try:
        return (value if isinstance(value, str) else json.dumps(value, allow_nan=False)).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(
            f"A field of the model is not JSON ({error}); give UTF-8 text, numbers, lists and dicts."
        ) from error
