"""Write a stored model to files that other tools read."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from store.blobs import BLOCK_BYTES, BlobStore, disk_errors, write_all
from store.index import INDEX_FILE, Weights, shard_file
from store.pieces import WeightsReader
from store.tensors import lay_out, numpy_dtype
from store.weights import SHARD_METADATA


def export_weights(store: BlobStore, weights: Weights, folder: Path) -> list[Path]:
    """Write the shard files and the index into the folder, as Hugging Face names them; return their paths."""
    blobs = {shard_file(position, len(weights.shards)): shard for position, shard in enumerate(weights.shards)}
    blobs[INDEX_FILE] = weights.index
    paths = []
    for name, blob in blobs.items():
        with new_file(folder / name) as path, store.open(blob) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, BLOCK_BYTES)
        paths.append(folder / name)
    return paths


def export_single(store: BlobStore, weights: Weights, path: Path) -> None:
    """Write the whole model as one safetensors file, a block at a time."""
    first, locations = lay_out(weights.schema, SHARD_METADATA)
    with (
        new_file(path) as temporary,
        temporary.open("wb", buffering=0) as target,
        WeightsReader(store, weights) as reader,
    ):
        write_all(target, first)
        for name, location in locations.items():
            dtype = numpy_dtype(location.spec.dtype)
            block = np.empty(BLOCK_BYTES // dtype.itemsize, dtype)
            for start in range(0, location.spec.num_elements, len(block)):
                piece = block[: location.spec.num_elements - start]
                reader.read(name, start, piece)
                write_all(target, piece.view(np.uint8).data)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Lend the name of a temporary file beside `path`, which replaces `path` at the end and is gone after an error."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    with disk_errors(path.parent):
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
