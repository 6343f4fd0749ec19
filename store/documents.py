"""Say what is recorded as plain documents: the results of the model store's methods, on whatever way they go out."""

from collections.abc import Mapping
from typing import Any

from store.lineage import Lineage
from store.model_stores import ModelStore
from store.models import ModelInfo
from store.parties import PartyInfo
from store.tensors import Schema
from store.upstreams import Upstream


def model_document(info: ModelInfo, *, tensors: Schema | None = None) -> dict[str, Any]:
    """Return a model_info; with `tensors`, also what each tensor is."""
    document = {
        "model_id": info.model_id,
        "tenant_id": info.tenant_id,
        "model_store_ddc": info.store,
        "model_kind": info.model_kind,
        "model_description": info.model_description,
        "model_meta": dict(info.model_meta),
        "model_state": int(info.model_state),
        "model_hash": info.model_hash,
        "model_size": info.model_size,
        "round": info.round,
        "hop_count": info.hop_count,
        "start_datetime": info.start_datetime,
        "end_datetime": info.end_datetime,
        "location": _plain_location(info),
        "parents": list(info.parents),
        "job_id": info.job_id,
        "site": info.site,
        "num_examples": info.num_examples,
        "metrics": dict(info.metrics),
        "shards": [{"digest": shard.digest, "size": shard.size} for shard in info.shards],
        "index_hash": info.index_hash,
        "origin": _origin(info),
        "created_at": info.created_at,
        "kept": info.kept,
        "expired_at": info.expired_at,
        "expired_reason": info.expired_reason,
    }
    if tensors is not None:
        document["tensors"] = tensors_document(tensors)
    return document


def lineage_document(each: Lineage) -> dict[str, Any]:
    """Return what is known of one model of a lineage; of one that is not there, only its id."""
    model = each.model
    return {
        "model_id": each.model_id,
        "model_store_ddc": model and model.store,
        "model_kind": model and model.model_kind,
        "model_description": model and model.model_description,
        "model_state": model and int(model.model_state),
        "model_hash": model and model.model_hash,
        "round": model and model.round,
        "hop_count": model and model.hop_count,
        "job_id": model and model.job_id,
        "site": model and model.site,
        "tenant_id": model and model.tenant_id,
        "num_examples": model and model.num_examples,
        "metrics": model and dict(model.metrics),
        "origin": model and _origin(model),
        "created_at": model and model.created_at,
        "expired_at": model and model.expired_at,
        "parents": [] if model is None else [parent.model_id for parent in each.parents],
    }


def tensors_document(tensors: Schema) -> dict[str, Any]:
    """Return what each tensor is, by name."""
    return {name: {"dtype": spec.dtype, "shape": list(spec.shape)} for name, spec in tensors.items()}


def party_document(party: PartyInfo) -> dict[str, Any]:
    """Return a party_info."""
    return {
        "id": party.id,
        "tenant_id": party.tenant_id,
        "tenant_name": party.tenant_name,
        "description": party.description,
        "hop_count": party.hop_count,
        "created_at": party.created_at,
        "updated_at": party.updated_at,
    }


def store_document(store: ModelStore) -> dict[str, Any]:
    """Return a ddc_info: what is known of a model store."""
    return {
        "id": store.id,
        "model_store_ddc": store.name,
        "tenant_id": store.tenant_id,
        "description": store.description,
        "created_at": store.created_at,
        "updated_at": store.updated_at,
    }


def upstream_document(upstream: Upstream) -> dict[str, Any]:
    """Return an upstream_info, in which the secret is not."""
    return {
        "id": upstream.id,
        "model_store_ddc": upstream.store,
        "upstream_endpoint": upstream.url,
        "upstream_apikey": upstream.api_key,
        "upstream_model_store_ddc": upstream.upstream_store,
        "alias": upstream.alias,
        "description": upstream.description,
        "enabled": upstream.enabled,
        "created_at": upstream.created_at,
        "updated_at": upstream.updated_at,
    }


def _plain_location(info: ModelInfo) -> list[float] | str | None:
    return info.location if info.location is None or isinstance(info.location, str) else list(info.location)


def _origin(info: ModelInfo) -> Mapping[str, str | None] | None:
    if info.origin_node is None:
        return None
    return {"node_id": info.origin_node, "model_id": info.origin_model_id}
