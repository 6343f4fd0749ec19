"""Recompute a global model from the updates that it was made of, and say whether it is the same to the bit.

Every blob is hashed before it is read; of an S3 store, what is in the bucket, not the coordinator's cache of it. The
recomputation is the coordinator's own aggregation, written beside the store: it needs room on the disk for a model, and
for what a server optimizer keeps with it, which is recomputed and compared too; and no more memory than a round does.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from common.errors import InvalidInput, NotFound
from coordinator.combining import OPTIMIZER, Recipe, aggregate_updates, staleness_of, state_id
from coordinator.differences import differences
from coordinator.jobfile import StrategyTable
from coordinator.model_weights import model_weights
from coordinator.services import Services
from coordinator.strategies.optimizer import ServerOptimizer
from store.blobs import Blob, BlobStore, hash_open
from store.database import reading
from store.expiry import expiry_text, has_bytes
from store.folder import FolderStore
from store.index import Weights, plan_shards
from store.models import ModelInfo, find_model, get_model
from store.opening import open_blob_store

RECOMPUTED_KINDS = ("global", "moments")  # what a round makes of updates
_MEGABYTE = 2**20
_MOST_DISCOUNT = 1000  # of staleness, as an exponent; by far


class Result(StrEnum):
    """What came of it."""

    SAME = "same"  # recomputed, and equal to the bit
    INTACT = "intact"  # its blobs are what their digests say; there is nothing to recompute
    DIFFERENT = "different"  # a blob is not what its digest says, or the recomputed model is another one
    MISSING = "missing"  # something that is needed was deleted
    EXPIRED = "expired"  # the bytes of something that is needed are kept no more


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is known of one model after it was looked at."""

    model_id: str
    title: str  # the model's name for people
    result: Result
    sentence: str  # what was found
    troubles: tuple[str, ...] = ()  # what is missing or different, one by one
    updates: int = 0  # that it was recomputed from
    blobs: int = 0  # that were hashed
    bytes: int = 0  # that were hashed


@dataclass(kw_only=True)
class _Hashing:
    """What the blobs of a model and its updates turned out to be; it grows while they are hashed."""

    missing: list[str] = field(default_factory=list)
    expired: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    blobs: int = 0
    bytes: int = 0


def verify(services: Services, model_id: str, *, whole_chain: bool = False) -> Iterator[Verdict]:
    """Look at the model and, for the whole chain, at each model that it goes on from, the newest first.

    Raise NotFound if there is no model whose id begins so, StoreUnavailable if the store does not answer.
    """
    with reading(services.engine) as connection:
        model = find_model(connection, model_id)
    with _fresh_store(services) as store:
        while True:
            yield _verify(services, store, model)
            previous = _previous(model)
            if previous is None or not whole_chain:
                return
            found = _find(services, previous)
            if found is None:
                said = "Its record was deleted, so the chain ends here."
                yield Verdict(model_id=previous, title=previous, result=Result.MISSING, sentence=said)
                return
            model = found


@contextmanager
def _fresh_store(services: Services) -> Iterator[BlobStore]:
    """Give the blob store; of S3, one with an empty cache, so that every byte comes from the bucket."""
    if services.settings.blob_store == "folder":
        yield services.blobs
        return
    with tempfile.TemporaryDirectory(prefix="verify-", dir=services.blobs.scratch()) as folder:
        store = open_blob_store(services.settings.model_copy(update={"cache_folder": Path(folder)}))
        store.prepare()
        yield store


def _verify(services: Services, store: BlobStore, model: ModelInfo) -> Verdict:
    title = f"{model.model_description or model.model_kind or 'a model'} ({model.model_id[:8]})"
    hashing = _Hashing()
    _hash_blobs(store, model, "the model", hashing)
    strategy = _strategy(model)
    recipe = _recipe(services, store, model, strategy, hashing) if strategy is not None else None
    kept = _kept(services, store, model, hashing) if recipe is not None and recipe.has_state else None
    common: dict[str, Any] = {
        "model_id": model.model_id,
        "title": title,
        "blobs": hashing.blobs,
        "bytes": hashing.bytes,
    }
    if hashing.different:
        said = "What is stored is not what its digests and records say."
        troubles = (*hashing.different, *hashing.missing, *hashing.expired)
        return Verdict(**common, result=Result.DIFFERENT, sentence=said, troubles=troubles)
    if hashing.missing:
        said = "It cannot be verified: something that is needed was deleted."
        troubles = (*hashing.missing, *hashing.expired)
        return Verdict(**common, result=Result.MISSING, sentence=said, troubles=troubles)
    if hashing.expired:
        said = "It cannot be verified any more: bytes that are needed have expired and were removed."
        return Verdict(**common, result=Result.EXPIRED, sentence=said, troubles=tuple(hashing.expired))
    if strategy is None or recipe is None:
        said = (
            f"Its {hashing.blobs} blobs are what their digests say; {_origin(model)}, so there is nothing to recompute."
        )
        return Verdict(**common, result=Result.INTACT, sentence=said)
    common["updates"] = len(recipe.updates)
    if troubles := _recompute(services, store, recipe, [model, *([kept] if kept else [])]):
        said = f"Recomputed from {_counted(recipe.updates)}, it is another model than the one that is stored."
        return Verdict(**common, result=Result.DIFFERENT, sentence=said, troubles=troubles)
    too = ", and so is what the optimizer keeps" if kept else ""
    said = f"Recomputed from {_counted(recipe.updates)} with {strategy.name}, it is the same to the bit{too}."
    return Verdict(**common, result=Result.SAME, sentence=said)


def _hash_blobs(store: BlobStore, model: ModelInfo, whose: str, hashing: _Hashing) -> None:
    """Hash all blobs of a model; note those that are missing or something else."""
    if model.expired_at is not None and not has_bytes(store, model):
        hashing.expired.append(f"{whose[:1].upper()}{whose[1:]} {expiry_text(model)}")
        return
    sizes = {shard.digest: shard.size for shard in model.shards}
    for digest in dict.fromkeys([model.index_hash or model.model_hash, *sizes]):
        try:
            blob = store.find(digest)
        except NotFound:
            hashing.missing.append(f"Blob {digest} of {whose} is not in the object store any more.")
            continue
        if trouble := _hash_blob(store, Blob(digest=digest, size=sizes.get(digest, blob.size))):
            hashing.different.append(f"Blob {digest} of {whose}: {trouble}")
            continue
        hashing.blobs += 1
        hashing.bytes += blob.size


def _hash_blob(store: BlobStore, blob: Blob) -> str:
    """Return what is wrong with the blob's bytes; empty if nothing is."""
    try:
        with store.open(blob) as file:
            found = hash_open(file)
    except NotFound as error:  # it is there, so it is damaged, and this says how
        return error.message
    return "" if found == blob else f"its {found.size} bytes have the digest {found.digest}."


def _strategy(model: ModelInfo) -> StrategyTable | None:
    """Return the strategy that made the model; None if none did, or none that is recorded."""
    recorded = model.model_meta.get("strategy")
    if model.model_kind not in RECOMPUTED_KINDS or model.site is not None or recorded is None:
        return None
    try:
        strategy = StrategyTable.model_validate(recorded)
        strategy.make()
    except (ValidationError, InvalidInput) as error:
        raise InvalidInput(
            f"Model {model.model_id} was made with a strategy that this FedChord does not know ({error}); use the one "
            "that made it."
        ) from error
    return strategy


def _origin(model: ModelInfo) -> str:
    if model.model_kind == OPTIMIZER:
        return "it is what an optimizer keeps and is recomputed with the round's global model"
    return f"{model.site} made it" if model.site else "no record says that it was aggregated"


def _sites(model: ModelInfo) -> list[str]:
    """Return the sites whose updates are in the model, in the order of aggregation; empty for any other model."""
    sites = model.model_meta.get("sites")
    is_made_here = model.model_kind in RECOMPUTED_KINDS and model.site is None and isinstance(sites, list)
    return [str(site) for site in sites or []] if is_made_here else []


def _previous(model: ModelInfo) -> str | None:
    """Return the id of the model that this one goes on from: the parent that is no update."""
    count = len(_sites(model))
    others = model.parents[:-count] if count else model.parents
    return others[0] if others else None


def _find(services: Services, model_id: str) -> ModelInfo | None:
    with reading(services.engine) as connection:
        try:
            return get_model(connection, model_id)
        except NotFound:
            return None


def _updates(services: Services, store: BlobStore, model: ModelInfo, hashing: _Hashing) -> list[ModelInfo]:
    """Return the updates that the model was made of, in order, their blobs hashed; note what is missing."""
    sites = _sites(model)
    if not sites or len(model.parents) < len(sites):
        hashing.missing.append(
            f"It was made of {len(sites) or 'unknown'} updates, of which this node has no record; verify it where it "
            "was made."
        )
        return []
    found = []
    for site, model_id in zip(sites, model.parents[-len(sites) :], strict=True):
        update = _needed(services, store, model_id, f"the update of {site}", hashing)
        if update is None:
            continue
        if update.site != site or not update.num_examples:
            hashing.different.append(f"Parent {model_id} is not the update of {site} that the model's record names.")
        found.append(update)
    return found


def _needed(services: Services, store: BlobStore, model_id: str, whose: str, hashing: _Hashing) -> ModelInfo | None:
    """Return a model that is needed, its blobs hashed; note it and return None if its record was deleted."""
    found = _find(services, model_id)
    if found is None:
        hashing.missing.append(f"{whose[0].upper()}{whose[1:]} ({model_id}) was deleted.")
    else:
        _hash_blobs(store, found, whose, hashing)
    return found


def _recipe(
    services: Services, store: BlobStore, model: ModelInfo, strategy: StrategyTable, hashing: _Hashing
) -> Recipe:
    """Return all that the model was computed with, by its record, the blobs hashed; note what is missing."""
    made = strategy.make()
    updates = _updates(services, store, model, hashing)
    recipe = Recipe(strategy=made, updates=tuple(updates), staleness=(0,) * len(updates))
    if model.model_kind != "global" or hashing.missing or hashing.different:
        return recipe
    staleness = tuple(staleness_of(update, model.round) for update in updates)
    bases = {}
    for update, rounds in zip(updates, staleness, strict=True):
        base_id = update.parents[0] if update.parents else ""
        if rounds and base_id not in bases:
            bases[base_id] = _needed(services, store, base_id, f"the model that {update.site} trained", hashing)
    current = before = None
    if any(staleness) or isinstance(made, ServerOptimizer):
        current = _needed(services, store, _previous(model) or "", "the model before it", hashing)
    if current is not None and isinstance(made, ServerOptimizer) and (known := state_id(current, strategy)):
        before = _needed(services, store, known, "what the optimizer kept before it", hashing)
    return replace(
        recipe,
        staleness=staleness,
        discount=_discount(model, hashing),
        bases={base_id: base for base_id, base in bases.items() if base is not None},
        current=current,
        before=before,
    )


def _discount(model: ModelInfo, hashing: _Hashing) -> float:
    """Return the discount that the model's record names, 0 if it names none; note one that nobody can have used."""
    recorded = model.model_meta.get("discount", 0.0)
    if not isinstance(recorded, int | float) or not 0 <= recorded <= _MOST_DISCOUNT:
        hashing.different.append(f"The model's record names the discount {str(recorded)[:80]!r}, which is none.")
        return 0.0
    return recorded


def _kept(services: Services, store: BlobStore, model: ModelInfo, hashing: _Hashing) -> ModelInfo | None:
    """Return what the optimizer has kept with the model, its blobs hashed; note it if that is missing or another."""
    named = model.model_meta.get(OPTIMIZER)
    recorded = named if isinstance(named, dict) else {}
    found = _needed(services, store, str(recorded.get("model_id", "")), "what the optimizer keeps", hashing)
    if found is not None and found.index_hash != recorded.get("digest"):
        hashing.different.append(
            f"Model {found.model_id} is not what the optimizer kept: its digest is {found.index_hash}, and the model's "
            f"record names {recorded.get('digest')}."
        )
    return found


class _Beside(FolderStore):
    """Read from the real store, write to a folder of its own."""

    def __init__(self, folder: Path, source: BlobStore) -> None:
        super().__init__(folder)
        self._source = source

    def find(self, digest: str) -> Blob:
        """Return the blob of the real store."""
        return self._source.find(digest)

    def open(self, blob: Blob) -> BinaryIO:
        """Open the blob of the real store."""
        return self._source.open(blob)


def _counted(updates: Sequence[ModelInfo]) -> str:
    return f"its {len(updates)} updates" if len(updates) != 1 else "its one update"


def _recompute(services: Services, store: BlobStore, recipe: Recipe, stored: Sequence[ModelInfo]) -> tuple[str, ...]:
    """Compute by the recipe again; return in what the results differ from the stored model and, if any, the state."""
    known = [model_weights(store, model) for model in stored]
    # the largest of the limits is not above the one that all were made with
    settings = services.settings.model_copy(update={"shard_megabytes": max(map(_shard_megabytes, known))})
    with tempfile.TemporaryDirectory(prefix="verify-", dir=services.blobs.scratch()) as folder:
        beside = _Beside(Path(folder), store)
        beside.prepare()
        combined = aggregate_updates(replace(services, blobs=beside, settings=settings), recipe)
        troubles: list[str] = []
        for model, weights, made in zip(stored, known, (combined.weights, combined.state), strict=False):
            if made is not None and made.index.digest != weights.index.digest:
                whose = "What the optimizer keeps: " if model.model_kind == OPTIMIZER else ""
                found = differences(store, weights, FolderStore(Path(folder)), made)
                troubles += [f"{whose}{said}" for said in found]
        return tuple(troubles)


def _shard_megabytes(weights: Weights) -> int:
    """Return a limit of the shards' size, in MiB, by which the tensors are spread as they are.

    The setting may have changed since. Any limit that the shards of several tensors keep within, and that is not above
    the one they were made with, spreads them in the same way.
    """
    nbytes = [0] * len(weights.shards)
    count = [0] * len(weights.shards)
    for name, position in weights.shard_of.items():
        nbytes[position] += weights.schema[name].nbytes
        count[position] += 1
    largest = max((total for total, tensors in zip(nbytes, count, strict=True) if tensors > 1), default=0)
    megabytes = max(1, -(-largest // _MEGABYTE))
    planned = plan_shards(weights.schema, megabytes * _MEGABYTE)
    actual = tuple(
        tuple(name for name, at in weights.shard_of.items() if at == position) for position in range(len(nbytes))
    )
    if planned != actual:
        raise InvalidInput(
            "The model's tensors are not spread over shards as FedChord does it; nothing can be compared."
        )
    return megabytes
