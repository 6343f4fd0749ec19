"""Say that a model's bytes have expired: when, why, and what can be done."""

from common.errors import Conflict, NotFound
from store.blobs import Blob, BlobStore
from store.models import ModelInfo


def has_bytes(blobs: BlobStore, model: ModelInfo) -> bool:
    """Return whether all blobs of the model are in the store."""
    indexes = [model.index_hash] if model.index_hash is not None else []
    wanted: list[Blob | str] = [*model.shards, *indexes]
    try:
        return all(blobs.find(each) if isinstance(each, str) else blobs.find(each.digest) == each for each in wanted)
    except NotFound:
        return False


def check_bytes(blobs: BlobStore, model: ModelInfo) -> None:
    """Raise NotFound that says why if the model has expired and its bytes are gone."""
    if model.expired_at is not None and not has_bytes(blobs, model):
        raise expired_error(model)


def check_not_expired(model: ModelInfo) -> None:
    """Raise Conflict for a model that has expired, although its bytes may still be there for a while."""
    if model.expired_at is not None:
        raise Conflict(
            f"Model {model.model_id} {expiry_text(model)}; bring it back with `fedchord models keep {model.model_id}` "
            "while its bytes are there, or take another model."
        )


def expired_error(model: ModelInfo) -> NotFound:
    """Return the error for a model whose bytes are gone."""
    return NotFound(
        f"Model {model.model_id} {expiry_text(model)}, and its bytes were removed; its record and its lineage stay. "
        "Take another model, or run its job again; `fedchord models keep` saves a model before it expires."
    )


def expiry_text(model: ModelInfo) -> str:
    """Return when the model expired, and why, as the rest of a sentence about it."""
    when = "" if model.expired_at is None else f" on {model.expired_at:%Y-%m-%d at %H:%M} UTC"
    return f"expired{when}: {model.expired_reason}"
