"""The local API's methods on models."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import ColumnElement

from common.errors import InvalidInput, NotFound
from store.client.multipart import opened
from store.conditions import parse_condition, parse_order
from store.database import reading, writing
from store.documents import lineage_document, model_document
from store.downloading import Download, prepare_download
from store.lineage import lineage
from store.local.base import LocalMethods
from store.model_stores import check_access, visible_stores
from store.models import (
    ModelInfo,
    ModelState,
    delete_model,
    delete_models,
    find_models,
    latest_feedbacked,
    latest_model,
)
from store.new_models import MAX_NAME_CHARACTERS, NewModel, check_new_model, check_text
from store.putting import put_file, spooled
from store.tensors import Schema
from store.weights import load_index

logger = logging.getLogger(__name__)

_MAX_OFFSET = 2**63 - 1
MAX_PAGE_BYTES = 48 << 20  # of records; as an answer they are at most some more
_MAX_ROUND = 2**31 - 1


class ModelMethods(LocalMethods):
    """Put, find, load and delete models."""

    def put_model(
        self,
        model_store_ddc: str,
        file: str | Path | BinaryIO,
        model_kind: str = "",
        model_description: str = "",
        model_meta: Mapping[str, Any] | None = None,
        model_state: int = ModelState.CREATED,
        *,
        round: int = 0,
        parents: Sequence[str] = (),
        metrics: Mapping[str, Any] | None = None,
        num_examples: int | None = None,
    ) -> dict[str, Any]:
        """Store a file, of any bytes, as a model of the model store and return its model_info."""
        new = NewModel(
            model_kind=model_kind,
            model_description=model_description,
            model_meta={} if model_meta is None else model_meta,
            model_state=model_state,
            round=round,
            parents=parents,
            metrics={} if metrics is None else metrics,
            num_examples=num_examples,
            tenant_id=self.caller.tenant_id,
        )
        with reading(self.store.engine) as connection:
            check_access(connection, self.caller, model_store_ddc, write=True)
        check_new_model(self.store.settings, new)
        with opened(file) as source, spooled(self.store, source.blocks()) as (path, blob):
            return model_document(put_file(self.store, model_store_ddc, path, blob, new))

    def put_aggregated_model(
        self,
        model_store_ddc: str,
        file: str | Path | BinaryIO,
        model_kind: str = "",
        model_description: str = "",
        model_meta: Mapping[str, Any] | None = None,
        model_state: int = ModelState.AGGREGATED,
        *,
        round: int = 0,
        parents: Sequence[str] = (),
        metrics: Mapping[str, Any] | None = None,
        num_examples: int | None = None,
    ) -> dict[str, Any]:
        """Store a file as a model that was made from others, which `parents` may name; return its model_info."""
        return self.put_model(
            model_store_ddc,
            file,
            model_kind,
            model_description,
            model_meta,
            model_state,
            round=round,
            parents=parents,
            metrics=metrics,
            num_examples=num_examples,
        )

    def load_model(self, model_store_ddc: str, model_id: str) -> Iterator[bytes]:
        """Return the model's bytes, block by block."""
        return self.prepare_download(model_store_ddc, model_id).open(0)

    def prepare_download(self, model_store_ddc: str, model_id: str, digest: str | None = None) -> Download:
        """Return the model's body, or with a digest that one of its blobs, to be read from any offset."""
        with reading(self.store.engine) as connection:
            model = self._model(connection, model_store_ddc, model_id)
        return prepare_download(self.store, model, digest)

    def get_model_info(self, model_store_ddc: str, model_id: str) -> dict[str, Any]:
        """Return the model_info; of a safetensors model also its tensors' names, shapes and dtypes."""
        with reading(self.store.engine) as connection:
            model = self._model(connection, model_store_ddc, model_id)
        return model_document(model, tensors=self._tensors(model))

    def exists_model(self, model_store_ddc: str, model_id: str) -> bool:
        """Return whether the model is in the model store."""
        with reading(self.store.engine) as connection:
            check_access(connection, self.caller, model_store_ddc, write=False)
            try:
                self._model(connection, model_store_ddc, model_id)
            except NotFound:
                return False
        return True

    def delete_model(self, model_store_ddc: str, model_id: str, raise_if_no_exists: bool = True) -> int:
        """Delete the model and return 1; of a missing one return 0, or raise NotFound as by default."""
        with writing(self.store.engine) as connection:
            check_access(connection, self.caller, model_store_ddc, write=True)
            try:
                delete_model(connection, self._model(connection, model_store_ddc, model_id).model_id)
            except NotFound:
                if raise_if_no_exists:
                    raise
                return 0
        return 1

    def delete_all_model(self, model_store_ddc: str) -> int:
        """Delete all models of the model store and return how many."""
        with writing(self.store.engine) as connection:
            check_access(connection, self.caller, model_store_ddc, write=True)
            return delete_models(connection, model_store_ddc)

    def get_models(
        self,
        model_store_ddc: str,
        conds: dict[str, Any] | None = None,
        offset: int = 0,
        limit: int | None = None,
        order: str | list[str] | None = None,
    ) -> list[dict[str, Any]]:
        """Return the model_info of the models that meet the conditions, by default of all, the newest first."""
        with reading(self.store.engine) as connection:
            check_access(connection, self.caller, model_store_ddc, write=False)
            found = find_models(
                connection,
                store=model_store_ddc,
                conditions=_condition(conds),
                order=parse_order(order),
                offset=_whole("offset", offset, _MAX_OFFSET) or 0,
                limit=_whole("limit", limit, _MAX_OFFSET),
                max_bytes=MAX_PAGE_BYTES,
            )
        return [model_document(model) for model in found]

    def get_model_info_latest(
        self, model_store_ddc: str, model_kind: str | None = None, round: int | None = None
    ) -> dict[str, Any]:
        """Return the model_info of the model that was added last; raise NotFound if there is none."""
        return self._latest(model_store_ddc, None, model_kind, round)

    def get_latest_aggregated_model(
        self, model_store_ddc: str, round: int | None = None, model_kind: str | None = None
    ) -> dict[str, Any]:
        """Return the model_info of the newest aggregated model; raise NotFound if there is none."""
        return self._latest(model_store_ddc, ModelState.AGGREGATED, model_kind, round)

    def get_latest_transferred_model(
        self, model_store_ddc: str, round: int | None = None, model_kind: str | None = None
    ) -> dict[str, Any]:
        """Return the model_info of the newest model from an upstream; raise NotFound if there is none."""
        return self._latest(model_store_ddc, ModelState.TRANSFERRED, model_kind, round)

    def get_latest_feedbacked_models(self, model_store_ddc: str, round: int | None = None) -> list[dict[str, Any]]:
        """Return the newest model_info that each origin fed back in the round, by default the highest there is."""
        with reading(self.store.engine) as connection:
            check_access(connection, self.caller, model_store_ddc, write=False)
            found = latest_feedbacked(connection, model_store_ddc, _whole("round", round, _MAX_ROUND))
        return [model_document(model) for model in found]

    def get_lineage(self, model_store_ddc: str, model_id: str) -> list[dict[str, Any]]:
        """Return the model and all that it comes from, each once, with the ids of its parents.

        Of a model that was deleted, or is in a model store that the caller may not read, there is only its id.
        """
        with reading(self.store.engine) as connection:
            model = self._model(connection, model_store_ddc, model_id)
            visible = {store.name for store in visible_stores(connection, self.caller)}
            found = lineage(connection, model.model_id, stores=visible)
        return [lineage_document(each) for _, each in found.walk() if each.followed]

    def _latest(
        self, model_store_ddc: str, state: ModelState | None, kind: str | None, round: int | None
    ) -> dict[str, Any]:
        with reading(self.store.engine) as connection:
            check_access(connection, self.caller, model_store_ddc, write=False)
            if kind is not None:
                check_text("model_kind", kind, MAX_NAME_CHARACTERS)
            found = latest_model(
                connection,
                store=model_store_ddc,
                state=state,
                kind=kind,
                round=_whole("round", round, _MAX_ROUND),
            )
        if found is None:
            asked = {"model_state": state and state.name, "model_kind": kind and kind[:80], "round": round}
            such = ", ".join(f"{name} {value}" for name, value in asked.items() if value is not None)
            raise NotFound(f"There is no model{such and f' of {such}'} in {model_store_ddc}; put one first.")
        return model_document(found)

    def _tensors(self, model: ModelInfo) -> Schema | None:
        if model.index_hash is None:
            return None
        try:
            return load_index(self.store.blobs, model.index_hash).schema
        except NotFound as error:  # what is recorded of the model is right all the same
            if model.expired_at is not None:
                return None
            logger.warning("The index of model %s is gone: %s", model.model_id, error, extra={"action": "index_gone"})
            return None


def _condition(conds: object) -> ColumnElement[bool] | None:
    return None if conds is None else parse_condition(conds)


def _whole(name: str, value: object, most: int) -> int | None:
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= most:
        raise InvalidInput(f"{name} is a whole number from 0 to {most}; {ascii(value)[:80]} is not.")
    return value
