"""Put models: keep their bytes, then record them, so that a model that can be seen is whole."""

import logging
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.errors import InvalidInput, InvalidTensors, NotFound, StoreUnavailable, TooLarge
from common.settings import Settings
from store.blobs import Blob, BlobStore, disk_errors, new_hasher, write_all
from store.database import reading, writing
from store.index import Weights
from store.model_stores import ModelStore, get_store, lock_store
from store.models import ModelInfo, add_model, find_copy
from store.new_models import NewModel, check_new_model, check_state, parse_meta, plain_json
from store.opening import OpenStore
from store.tensors import read_header
from store.weights import inspect_shards, keep_index, register_shards

__all__ = ["NewModel", "check_new_model", "parse_meta", "put_file", "put_shards", "spooled"]

logger = logging.getLogger(__name__)

_MAX_HEADER_BYTES = 8 << 20  # some 70,000 tensors; a larger header is not parsed, and its file is opaque
_MAX_SHARDS = 10_000


def put_file(store: OpenStore, name: str, path: Path, blob: Blob, new: NewModel) -> ModelInfo:
    """Take over the file, which is then gone, as a model of the model store; return its record.

    `blob` says what the caller hashed while it wrote the file. Raise InvalidInput or TooLarge for what cannot be kept,
    NotFound if the model store is not there, also if it is deleted meanwhile: then nothing is recorded.
    """
    check_new_model(store.settings, new)
    check_size_limit(store.settings, blob.size)
    with reading(store.engine) as connection:
        place = get_store(connection, name)
    try:
        with disk_errors(path.parent), path.open("rb", buffering=0) as file:
            locations = read_header(file, blob.size, max_header_bytes=_MAX_HEADER_BYTES)
    except InvalidTensors:
        store.blobs.put(path, blob=blob)
        index_hash = None
    else:
        store.blobs.put(path, blob=blob)
        schema = {tensor: location.spec for tensor, location in locations.items()}
        index_hash = keep_index(store.blobs, schema, dict.fromkeys(schema, 0), [blob]).index.digest
    return _record(store, place, new, model_hash=blob.digest, index_hash=index_hash, shards=(blob,))


def put_shards(
    store: OpenStore, name: str, index: Blob | None, shards: Sequence[Blob], model_hash: str, new: NewModel
) -> ModelInfo:
    """Record stored blobs as a model of the model store, if they are what its hash says; return its record.

    The hash is that of the one blob of a file, or that of the index of the shards, which `index` names. Raise
    InvalidInput unless it is, NotFound for a blob or a model store that is not there. A copy of a model of which there
    is a copy already is not recorded again: the one that there is is returned.
    """
    check_new_model(store.settings, new)
    if not 1 <= len(shards) <= _MAX_SHARDS:
        raise InvalidInput(f"A model has 1 to {_MAX_SHARDS} shards, not {len(shards)}; send those that it has.")
    check_size_limit(store.settings, sum(shard.size for shard in shards))
    with reading(store.engine) as connection:
        place = get_store(connection, name)
    for shard in shards:
        _check_stored(store.blobs, shard)
    is_file = len(shards) == 1 and shards[0].digest == model_hash
    if is_file:
        weights = _tensors_of_file(store.blobs, shards[0])
    else:
        weights = _tensors_of_shards(store.blobs, shards, model_hash)
    index_hash = None if weights is None else weights.index.digest
    if index is not None and index.digest != index_hash:
        raise InvalidInput(f"{index.digest} is not the index of these shards; send the model again.")
    return _record(store, place, new, model_hash=model_hash, index_hash=index_hash, shards=tuple(shards))


@contextmanager
def spooled(store: OpenStore, blocks: Iterable[bytes]) -> Iterator[tuple[Path, Blob]]:
    """Lend a new file of the blocks and its blob, hashed on the way; the file is gone at the end unless it was taken.

    Raise TooLarge when there is more than a model may have.
    """
    path = store.blobs.scratch() / secrets.token_hex(16)
    hasher, size = new_hasher(), 0
    try:
        with disk_errors(path.parent), path.open("xb", buffering=0) as file:
            for block in blocks:
                size += len(block)
                check_size_limit(store.settings, size)
                hasher.update(block)
                write_all(file, block)
        yield path, Blob(digest=hasher.hexdigest(), size=size)
    finally:
        path.unlink(missing_ok=True)


def check_size_limit(settings: Settings, size: int) -> None:
    """Raise TooLarge if a model of so many bytes is more than the settings allow."""
    if size > settings.max_model_gigabytes * 10**9:
        raise TooLarge(
            f"The model is larger than {settings.max_model_gigabytes:g} GB; make it smaller, or have "
            "FEDCHORD_MAX_MODEL_GIGABYTES raised."
        )


def _check_stored(blobs: BlobStore, blob: Blob) -> None:
    if (found := blobs.find(blob.digest)) != blob:
        raise InvalidInput(f"Blob {blob.digest} has {found.size} bytes, not {blob.size}; send its right size.")


def _check_kept(blobs: BlobStore, shards: Sequence[Blob], index_hash: str | None) -> None:
    """Raise StoreUnavailable if a blob was removed as unused since it was put; under the lock none is any more."""
    try:
        for digest in [*(shard.digest for shard in shards), *([index_hash] if index_hash else [])]:
            blobs.find(digest)
    except NotFound as error:
        raise StoreUnavailable("The bytes were removed meanwhile, for no model needed them; put them again.") from error


def _tensors_of_file(blobs: BlobStore, blob: Blob) -> Weights | None:
    """Return the tensors of a stored file, the index of which is then stored, or None for an opaque one."""
    with blobs.open(blob) as file:
        try:
            read_header(file, blob.size, max_header_bytes=_MAX_HEADER_BYTES)
        except InvalidTensors:
            return None
    return register_shards(blobs, [blob])


def _tensors_of_shards(blobs: BlobStore, shards: Sequence[Blob], model_hash: str) -> Weights:
    weights = inspect_shards(blobs, shards)
    if weights.index.digest != model_hash:
        raise InvalidInput(
            f"The model's hash is {model_hash[:80]}, but that of these shards is {weights.index.digest}; send the "
            "model's own."
        )
    return keep_index(blobs, weights.schema, weights.shard_of, shards)


def _record(
    store: OpenStore,
    place: ModelStore,
    new: NewModel,
    *,
    model_hash: str,
    index_hash: str | None,
    shards: tuple[Blob, ...],
) -> ModelInfo:
    info = ModelInfo(
        store=place.name,
        tenant_id=new.tenant_id,
        model_kind=new.model_kind,
        model_description=new.model_description,
        model_meta=plain_json(new.model_meta, store.settings, name="model_meta"),
        model_state=check_state(new.model_state),
        model_hash=model_hash,
        index_hash=index_hash,
        model_size=sum(shard.size for shard in shards),
        round=new.round,
        hop_count=new.hop_count,
        start_datetime=new.start_datetime,
        end_datetime=new.end_datetime,
        location=new.location,
        parents=tuple(new.parents),
        num_examples=new.num_examples,
        metrics=plain_json(new.metrics, store.settings, name="metrics"),
        shards=shards,
        origin_node=new.origin_node,
        origin_model_id=new.origin_model_id,
    )
    with writing(store.engine) as connection:
        # Alone, so that of two that record the same copy the second one sees it.
        locked = lock_store(connection, place.name, alone=new.origin_node is not None)
        if locked is None or locked.id != place.id:  # one of the same name may be another tenant's
            raise NotFound(f"Model store {place.name} was deleted meanwhile; make it again before you put the model.")
        _check_kept(store.blobs, shards, index_hash)
        if new.origin_node is not None and new.origin_model_id is not None:
            known = find_copy(connection, place.name, new.origin_node, new.origin_model_id)
            if known is not None:
                return known
        added = add_model(connection, info)
    logger.info(
        "Model %s of %s bytes was put into %s.",
        added.model_id,
        added.model_size,
        place.name,
        extra={"action": "put_model", "model": added.model_id, "model_store": place.name},
    )
    return added
