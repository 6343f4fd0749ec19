"""Use a model store's service from Python.

    from store.client import Api

    api = Api()  # where the settings say: FEDCHORD_STORE_URL, FEDCHORD_STORE_API_KEY, FEDCHORD_STORE_SECRET
    api.initialize_model_store("ddc:my_first_model_store")
    api.put_model("ddc:my_first_model_store", "model.safetensors", model_description="the first one")

Every method is one of the service, with its parameters and results; times come back aware, in the local zone. What the
service refuses is raised as the error that it is (`common.errors`), and a service that cannot be used is Unavailable.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import Unavailable
from store.blobs import Blob, disk_errors, write_all
from store.client.multipart import MultipartBody, Source
from store.client.reception import Reception
from store.client.session import Session, set_logger
from store.export import new_file
from store.models import ModelState

__all__ = ["Api", "FlEvents", "set_logger"]

FlEvents = ModelState  # as the model store's other clients name the states

Document = dict[str, Any]  # a model_info, party_info, …


class Api(Session):
    """The methods of a service, with the URL and keys of the settings unless it is given others."""

    # Model stores

    def get_server_version(self) -> str:
        """Return the version of the service."""
        return self._ask("get_server_version", str)

    def initialize_model_store(self, model_store_ddc: str, description: str = "") -> Document:
        """Create the model store, unless the caller has it already, and return its ddc_info."""
        return self._ask("initialize_model_store", dict, model_store_ddc=model_store_ddc, description=description)

    def exists_store(self, model_store_ddc: str) -> bool:
        """Return whether there is such a model store that the caller may use."""
        return self._ask("exists_store", bool, model_store_ddc=model_store_ddc)

    def delete_store(self, model_store_ddc: str, raise_if_no_exists: bool = True) -> int:
        """Forget the model store and all in it; return 1, or 0 if it was not there and that is no error."""
        return self._ask("delete_store", int, model_store_ddc=model_store_ddc, raise_if_no_exists=raise_if_no_exists)

    def get_stores(self) -> list[Document]:
        """Return the model stores that the caller may use."""
        return self._ask("get_stores", list)

    # Models

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
    ) -> Document:
        """Store a file, given by its path or open, as a new model, and return its model_info."""
        return self._put(
            "put_model",
            file,
            model_store_ddc=model_store_ddc,
            model_kind=model_kind,
            model_description=model_description,
            model_meta=dict(model_meta or {}),
            model_state=int(model_state),
            round=round,
            parents=list(parents),
            metrics=dict(metrics or {}),
            num_examples=num_examples,
        )

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
    ) -> Document:
        """Store a file as a model that was made from others, and return its model_info."""
        return self._put(
            "put_aggregated_model",
            file,
            model_store_ddc=model_store_ddc,
            model_kind=model_kind,
            model_description=model_description,
            model_meta=dict(model_meta or {}),
            model_state=int(model_state),
            round=round,
            parents=list(parents),
            metrics=dict(metrics or {}),
            num_examples=num_examples,
        )

    def load_model(self, model_store_ddc: str, model_id: str) -> Reception:
        """Return the model's bytes block by block; what is cut goes on, and the digest is checked at the end."""
        return self._transfer("load_model", lambda: Reception(self._remote, model_store_ddc, model_id))

    def load_blob(self, model_store_ddc: str, model_id: str, digest: str, path: Path) -> Blob:
        """Write one blob of the model, a shard or the index, to a new file, which is there when it is whole."""
        with (
            self.receive_blob(model_store_ddc, model_id, digest) as blocks,
            disk_errors(path.parent),
            new_file(path) as new,
            new.open("wb", buffering=0) as target,
        ):
            for block in blocks:
                write_all(target, block)
        return Blob(digest=digest, size=blocks.size)

    def receive_blob(self, model_store_ddc: str, model_id: str, digest: str) -> Reception:
        """Return one blob of the model block by block, as `load_model` does."""
        received = self._transfer("load_model", lambda: Reception(self._remote, model_store_ddc, model_id, digest))
        if received.digest != digest:
            received.close()
            raise Unavailable(f"{self._remote.url} sends blob {received.digest} in place of {digest}; check the URL.")
        return received

    def put_blob(self, model_store_ddc: str, blob: Blob, blocks: Callable[[], Iterator[bytes]]) -> Blob:
        """Send a blob of a model that will be offered; `blocks` reads it from its beginning at each call."""
        body = MultipartBody(
            {"model_store_ddc": model_store_ddc, "digest": blob.digest, "size": blob.size},
            Source(blocks=blocks, size=blob.size, name=blob.digest),
        )
        self._transfer("put_blob", lambda: self._remote.upload("fl.put_blob", body, repeatable=True))
        return blob

    def get_model_info(self, model_store_ddc: str, model_id: str) -> Document:
        """Return the model_info of the model, of a safetensors model with what each tensor is."""
        return self._ask("get_model_info", dict, model_store_ddc=model_store_ddc, model_id=model_id)

    def exists_model(self, model_store_ddc: str, model_id: str) -> bool:
        """Return whether the model is in the model store."""
        return self._ask("exists_model", bool, model_store_ddc=model_store_ddc, model_id=model_id)

    def delete_model(self, model_store_ddc: str, model_id: str, raise_if_no_exists: bool = True) -> int:
        """Forget the model; return 1, or 0 if it was not there and that is no error."""
        return self._ask(
            "delete_model",
            int,
            model_store_ddc=model_store_ddc,
            model_id=model_id,
            raise_if_no_exists=raise_if_no_exists,
        )

    def delete_all_model(self, model_store_ddc: str) -> int:
        """Forget all models of the model store and return how many those were."""
        return self._ask("delete_all_model", int, model_store_ddc=model_store_ddc)

    def get_models(
        self,
        model_store_ddc: str,
        conds: Mapping[str, Any] | None = None,
        offset: int = 0,
        limit: int | None = None,
        order: str | Sequence[str] | None = None,
    ) -> list[Document]:
        """Return the model_infos that meet conditions as {"=": ["model_state", 20]}, in an order as "-created_at"."""
        return self._ask(
            "get_models",
            list,
            model_store_ddc=model_store_ddc,
            conds=conds,
            offset=offset,
            limit=limit,
            order=order,
        )

    def get_model_info_latest(
        self, model_store_ddc: str, model_kind: str | None = None, round: int | None = None
    ) -> Document:
        """Return the newest model_info, of the kind and round if given."""
        return self._ask(
            "get_model_info_latest", dict, model_store_ddc=model_store_ddc, model_kind=model_kind, round=round
        )

    def get_latest_feedbacked_models(self, model_store_ddc: str, round: int | None = None) -> list[Document]:
        """Return the newest model_info that each origin fed back, in the given round or the last one."""
        return self._ask("get_latest_feedbacked_models", list, model_store_ddc=model_store_ddc, round=round)

    def get_latest_aggregated_model(
        self, model_store_ddc: str, round: int | None = None, model_kind: str | None = None
    ) -> Document:
        """Return the newest model_info that was aggregated, of the round and kind if given."""
        return self._ask(
            "get_latest_aggregated_model", dict, model_store_ddc=model_store_ddc, round=round, model_kind=model_kind
        )

    def get_latest_transferred_model(
        self, model_store_ddc: str, round: int | None = None, model_kind: str | None = None
    ) -> Document:
        """Return the newest model_info that came from an upstream, of the round and kind if given."""
        return self._ask(
            "get_latest_transferred_model", dict, model_store_ddc=model_store_ddc, round=round, model_kind=model_kind
        )

    def get_lineage(self, model_store_ddc: str, model_id: str) -> list[Document]:
        """Return the model and all that it comes from, each once, with the ids of its parents."""
        return self._ask("get_lineage", list, model_store_ddc=model_store_ddc, model_id=model_id)

    # The hierarchy

    def feedback(self, model_store_ddc: str, model_id: str, upstream: str | None = None) -> Document:
        """Have the service send the model to its upstream; return the model_info that the upstream made of it."""
        return self._ask_to_move("feedback", model_store_ddc=model_store_ddc, model_id=model_id, upstream=upstream)

    def request_transfer(self, model_store_ddc: str, upstream: str | None = None) -> Document:
        """Have the service bring the upstream's newest aggregated model down; return its model_info here."""
        return self._ask_to_move("request_transfer", model_store_ddc=model_store_ddc, upstream=upstream)

    def proxy_request_transfer_info(self, model_store_ddc: str = "", upstream: str | None = None) -> Document:
        """Return the upstream's model_info of its newest aggregated model; nothing is moved."""
        return self._ask("proxy_request_transfer_info", dict, model_store_ddc=model_store_ddc, upstream=upstream)

    def get_parties(self, *, here: bool = False) -> list[Document]:
        """Return the party_info of the parties that are registered at the service's upstream, or `here`, with it."""
        return self._ask("get_parties", list, here=here)

    def create_party(self, description: str = "") -> Document:
        """Register the service's own organisation as a party at its upstream, and return its party_info."""
        return self._ask("create_party", dict, description=description)

    def delete_party(self, id: str) -> int:
        """Take the party from the upstream; return how many that were, 0 or 1."""
        return self._ask("delete_party", int, id=id)

    def create_upstream_info(
        self,
        model_store_ddc: str,
        upstream_endpoint: str,
        upstream_apikey: str = "",
        upstream_secret: str = "",
        upstream_model_store_ddc: str = "",
        alias: str = "default",
        description: str = "",
        enabled: bool = True,
    ) -> Document:
        """Record an upstream of the model store and return it; the secret is never shown again."""
        return self._ask(
            "create_upstream_info",
            dict,
            model_store_ddc=model_store_ddc,
            upstream_endpoint=upstream_endpoint,
            upstream_apikey=upstream_apikey,
            upstream_secret=upstream_secret,
            upstream_model_store_ddc=upstream_model_store_ddc,
            alias=alias,
            description=description,
            enabled=enabled,
        )

    def update_upstream_info(
        self,
        id: str,
        upstream_endpoint: str | None = None,
        upstream_apikey: str | None = None,
        upstream_secret: str | None = None,
        upstream_model_store_ddc: str | None = None,
        alias: str | None = None,
        description: str | None = None,
        enabled: bool | None = None,
    ) -> Document:
        """Change what is given of an upstream and return its upstream_info."""
        return self._ask(
            "update_upstream_info",
            dict,
            id=id,
            upstream_endpoint=upstream_endpoint,
            upstream_apikey=upstream_apikey,
            upstream_secret=upstream_secret,
            upstream_model_store_ddc=upstream_model_store_ddc,
            alias=alias,
            description=description,
            enabled=enabled,
        )

    def delete_upstream_info(self, id: str, raise_if_no_exists: bool = True) -> int:
        """Forget the upstream; return 1, or 0 if it was not there and that is no error."""
        return self._ask("delete_upstream_info", int, id=id, raise_if_no_exists=raise_if_no_exists)

    def get_upstream_info(self, id: str) -> Document:
        """Return the upstream_info, without its secret."""
        return self._ask("get_upstream_info", dict, id=id)

    def list_upstream_info(self, model_store_ddc: str | None = None) -> list[Document]:
        """Return the upstream_info of the model store's upstreams, or of all that are the caller's."""
        return self._ask("list_upstream_info", list, model_store_ddc=model_store_ddc)

    # Server to server

    def get_path(self, model_store_ddc: str, via: Sequence[str] = ()) -> list[Document]:
        """Return the model store, and those that it feeds, upwards."""
        return self._ask("get_path", list, model_store_ddc=model_store_ddc, via=list(via))

    def offer_model(self, model_store_ddc: str, model: Document) -> Document:
        """Offer a copy of a model; return {"model": …} once it is recorded, before that {"missing": blobs to send}."""
        return self._ask("offer_model", dict, model_store_ddc=model_store_ddc, model=model)

    def register_party(
        self,
        id: str,
        tenant_id: str,
        tenant_name: str,
        description: str = "",
        hop_count: int = 1,
        via: Sequence[str] = (),
    ) -> Document:
        """Register a party that is so many hops away from the service; return its record there."""
        return self._ask(
            "register_party",
            dict,
            id=id,
            tenant_id=tenant_id,
            tenant_name=tenant_name,
            description=description,
            hop_count=hop_count,
            via=list(via),
        )

    def unregister_party(self, id: str, via: Sequence[str] = ()) -> int:
        """Take a party from the service, and from those above it; return how many that were."""
        return self._ask("unregister_party", int, id=id, via=list(via))
