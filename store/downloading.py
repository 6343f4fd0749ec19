"""Hand a model out as one body of bytes, from any offset.

A model of one blob is that blob. Shards are joined to one safetensors file, laid out as `export_single` does, while it
is read: no copy of the model is made.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from common.errors import InvalidInput, NotFound
from store.blobs import BLOCK_BYTES, Blob, BlobStore, new_hasher
from store.expiry import check_bytes
from store.index import Weights
from store.models import ModelInfo
from store.opening import OpenStore
from store.pieces import WeightsReader
from store.tensors import lay_out, numpy_dtype
from store.weights import SHARD_METADATA, load_index


@dataclass(frozen=True, kw_only=True, slots=True)
class Download:
    """A body of bytes that can be read more than once."""

    digest: str  # BLAKE3 of the whole body
    size: int  # bytes
    file_name: str  # under which to save it
    open: Callable[[int], Iterator[bytes]]  # gives blocks of at most BLOCK_BYTES, from an offset on


def prepare_download(store: OpenStore, model: ModelInfo, digest: str | None = None) -> Download:
    """Return the model's body, or with a digest the one of its blobs: a shard, or its index.

    Raise NotFound for a digest that is none of the model's, and for a model that has expired and is gone.
    """
    check_bytes(store.blobs, model)
    if digest is not None:
        return _download(store.blobs, _blob_of(store.blobs, model, digest), f"{digest}.bin")
    if not model.shards:
        raise NotFound(f"Model {model.model_id} is recorded without bytes; there is nothing to load.")
    if len(model.shards) == 1:
        suffix = "bin" if model.index_hash is None else "safetensors"
        return _download(store.blobs, model.shards[0], f"{model.model_id}.{suffix}")
    whole = _joined(store.blobs, model.index_hash or model.model_hash)
    return Download(
        digest=whole.digest,
        size=whole.size,
        file_name=f"{model.model_id}.safetensors",
        open=lambda start: _stream_joined(store.blobs, model.index_hash or model.model_hash, start),
    )


def _download(blobs: BlobStore, blob: Blob, file_name: str) -> Download:
    return Download(
        digest=blob.digest, size=blob.size, file_name=file_name, open=lambda start: _stream_blob(blobs, blob, start)
    )


def _stream_blob(blobs: BlobStore, blob: Blob, start: int) -> Iterator[bytes]:
    _check_offset(start, blob.size)
    return blobs.stream(blob, start)


def _blob_of(blobs: BlobStore, model: ModelInfo, digest: str) -> Blob:
    found = next((shard for shard in model.shards if shard.digest == digest), None)
    if found is None and digest == model.index_hash:
        found = blobs.find(digest)
    if found is None:
        raise NotFound(f"Model {model.model_id} has no blob {digest[:80]!r}; its model_info names those it has.")
    return found


_joined_blobs: OrderedDict[str, Blob] = OrderedDict()  # by index; to hash a model takes as long as to read it
_MAX_REMEMBERED = 1024


def _joined(blobs: BlobStore, index: str) -> Blob:
    """Return the blob that the joined shards would be, which the index alone determines."""
    known = _joined_blobs.get(index)
    if known is None:
        known = _joined_blobs[index] = _hash_joined(blobs, index)
        if len(_joined_blobs) > _MAX_REMEMBERED:
            _joined_blobs.popitem(last=False)
    return known


def _hash_joined(blobs: BlobStore, index: str) -> Blob:
    hasher, size = new_hasher(), 0
    for block in _stream_joined(blobs, index, 0):
        hasher.update(block)
        size += len(block)
    return Blob(digest=hasher.hexdigest(), size=size)


def _stream_joined(blobs: BlobStore, index: str, start: int) -> Iterator[bytes]:
    weights = load_index(blobs, index)
    first, locations = lay_out(weights.schema, SHARD_METADATA)
    size = max((location.end for location in locations.values()), default=len(first))
    _check_offset(start, size)
    return _filled(itertools.chain([first[start:]], _tensor_pieces(blobs, weights, start)))


def _tensor_pieces(blobs: BlobStore, weights: Weights, start: int) -> Iterator[bytes]:
    """Yield the tensors' bytes in their order in the file, from the file's offset on."""
    _, locations = lay_out(weights.schema, SHARD_METADATA)
    with WeightsReader(blobs, weights) as reader:
        for name, location in locations.items():
            if location.end <= start:
                continue
            item_bytes = numpy_dtype(location.spec.dtype).itemsize
            skipped = max(0, start - location.begin)
            for element in range(skipped // item_bytes, location.spec.num_elements, BLOCK_BYTES // item_bytes):
                count = min(BLOCK_BYTES // item_bytes, location.spec.num_elements - element)
                piece = np.empty(count, numpy_dtype(location.spec.dtype))
                reader.read(name, element, piece)
                data = piece.view(np.uint8).tobytes()
                yield data[max(0, skipped - element * item_bytes) :]


def _filled(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Join small pieces to blocks of at most BLOCK_BYTES, so that many small tensors do not cost a call each."""
    waiting: list[bytes] = []
    count = 0
    for piece in pieces:
        if count + len(piece) > BLOCK_BYTES and waiting:
            yield b"".join(waiting)
            waiting, count = [], 0
        if len(piece) > BLOCK_BYTES:  # a header of many tensors
            yield from (piece[begin : begin + BLOCK_BYTES] for begin in range(0, len(piece), BLOCK_BYTES))
        elif piece:
            waiting.append(piece)
            count += len(piece)
    if waiting:
        yield b"".join(waiting)


def _check_offset(start: int, size: int) -> None:
    if not 0 <= start <= size:
        raise InvalidInput(f"Byte {start} is not in a body of {size} bytes; ask from 0 to {size}.")
