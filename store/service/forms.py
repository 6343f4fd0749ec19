"""Read a multipart/form-data body piece by piece: small fields into memory, one file to the disk. Source: RFC 7578."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from common.errors import BrokenUpload, InvalidInput, TooLarge
from store.blobs import Blob, disk_errors, new_hasher, write_all

MAX_PARTS = 32
MAX_FIELD_BYTES = 1 << 20  # of all fields together, besides what the settings allow model_meta and metrics
FILE = "file"  # the name of the part that goes to the disk

MAX_HEADER_BYTES = 16 << 10  # of a part; the file's name is in it, and is not used
_PLAIN_ENCODINGS = {b"", b"binary", b"8bit", b"7bit"}


class UploadForm:
    """A form that is arriving. Whoever uses it closes it, and the file is gone unless somebody took it."""

    def __init__(
        self,
        boundary: bytes,
        path: Path,  # where the file goes; nothing is there yet
        fields: dict[str, str],  # is filled with whole fields, by name
        *,
        names: frozenset[str],  # of the fields that it may have
        max_field_bytes: int,  # of all fields together, for they are in memory
        max_file_bytes: int,
        on_file: Callable[[Mapping[str, str]], None],  # is shown the fields so far when the file begins; may refuse it
    ) -> None:
        self.path = path
        self._fields = fields
        self._names = names
        self._field_bytes_left = max_field_bytes
        self._max_file_bytes = max_file_bytes
        self._on_file = on_file
        self._num_parts = 0
        self._header = bytearray()  # the name of the header that is arriving
        self._value = bytearray()
        self._headers: dict[bytes, bytes] = {}  # of the part that is arriving
        self._name: str | None = None  # of the part that is arriving, None before its headers are read
        self._field = bytearray()
        self._file: BinaryIO | None = None
        self._file_bytes = 0
        self._hasher = new_hasher()
        self._blob: Blob | None = None  # of the whole file
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._take,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
                max_header_size=MAX_HEADER_BYTES,
            )
        except FormParserError as error:
            raise InvalidInput(f"The boundary of the form cannot be used ({error}); use a shorter one.") from error

    def feed(self, pieces: list[bytes]) -> None:
        """Take the body's next pieces; raise InvalidInput and its kinds, DiskFull, or what `on_file` raises."""
        with disk_errors(self.path.parent):
            for piece in pieces:
                try:
                    self._parser.write(piece)
                except FormParserError as error:
                    raise BrokenUpload(f"The body is not the multipart/form-data that it says: {error}.") from error

    def finish(self) -> Blob:
        """Return the file's blob; raise BrokenUpload unless the form came to its end, InvalidInput without a file."""
        if not self._ended:
            raise BrokenUpload("The upload ended before its last boundary; send it again.")
        if self._blob is None:
            raise InvalidInput(f"There is no file in the form; send it as the part named {FILE!r}.")
        return self._blob

    def close(self) -> None:
        """Forget the file, unless it was moved away."""
        if self._file is not None:
            self._file.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        """Return the form."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise InvalidInput(f"The form has more than {MAX_PARTS} parts; leave out what is not needed.")
        self._headers.clear()
        self._field.clear()
        self._name = None

    def _end_header(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _end_headers(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data":
            raise InvalidInput("A part of the form has no Content-Disposition: form-data with a name; give it one.")
        if self._headers.get(b"content-transfer-encoding", b"").lower() not in _PLAIN_ENCODINGS:
            raise InvalidInput(f"Part {name[:80]!r} is encoded; send its bytes as they are.")
        if name in self._fields or (name == FILE and self._blob is not None):
            raise InvalidInput(f"Part {name[:80]!r} is there twice; send it once.")
        if name == FILE:
            self._on_file(self._fields)
            self._file = self.path.open("xb", buffering=0)
        elif name not in self._names:
            raise InvalidInput(f"There is no field {name[:80]!r}; there are: {', '.join(sorted(self._names))}.")
        self._name = name

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._file is None:
            self._field_bytes_left -= end - start
            if self._field_bytes_left < 0:
                raise TooLarge(f"With {self._name!r}, the form's fields have more bytes than are taken; send less.")
            self._field += data[start:end]
            return
        self._file_bytes += end - start
        if self._file_bytes > self._max_file_bytes:
            raise TooLarge(
                f"The file has more than {self._max_file_bytes} bytes; send a smaller one, or have "
                "FEDCHORD_MAX_MODEL_GIGABYTES raised."
            )
        block = memoryview(data)[start:end]
        self._hasher.update(block)
        write_all(self._file, block)

    def _end_part(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._blob = Blob(digest=self._hasher.hexdigest(), size=self._file_bytes)
        elif self._name is not None:
            try:
                self._fields[self._name] = self._field.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InvalidInput(f"Field {self._name!r} is not UTF-8; send it as UTF-8.") from error

    def _end(self) -> None:
        self._ended = True
