"""The node above: its service, whose answers are checked before they are used.

What goes wrong there is told as such: UpstreamUnavailable when it does not answer, not in time or not sensibly; what it
refuses is the error that it names, with the words that it is the upstream's.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from common.errors import FedChordError, NotFound, Unavailable, UpstreamCycle, UpstreamUnavailable
from store.blobs import Blob
from store.client import Api
from store.exchange.foreign import MAX_PATH, ForeignAnswer, ForeignModel, ForeignParty, ForeignStore, brief
from store.models import ModelState
from store.opening import OpenStore
from store.upstreams import Upstream
from store.wire import to_wire

Answer = TypeVar("Answer")
Document = dict[str, Any]

_MAX_REPLY_BYTES = 8 << 20
_MAX_TERMS = 200  # in a condition
SLOWEST_BYTES_PER_SECOND = 10_000  # at which a blob has to come, or it would never end
_BROUGHT_DOWN = [int(ModelState.AGGREGATED), int(ModelState.TRANSFERRED)]

_MODEL = TypeAdapter(ForeignModel)
_MODELS = TypeAdapter(list[ForeignModel])
_PARTY = TypeAdapter(ForeignParty)
_PARTIES = TypeAdapter(list[ForeignParty])
_PATH = TypeAdapter(list[ForeignStore])
_ANSWER = TypeAdapter(ForeignAnswer)
_COUNT = TypeAdapter(int)


class Neighbour:
    """The service that a model store feeds, called with this node's keys there."""

    def __init__(self, store: OpenStore, upstream: Upstream, *, hops: int = 0) -> None:
        """Take the upstream; each of the hops that a call has made already halves the time that this one may take.

        So the node nearest to one that hangs gives up first, and the others get to hear of it.
        """
        self._store = store
        self._upstream = upstream
        self._api = Api(
            upstream.url,
            api_key=upstream.api_key,
            secret=upstream.secret.get_secret_value(),
            timeout_seconds=store.settings.upstream_timeout_seconds * 0.5**hops,
            max_reply_bytes=_MAX_REPLY_BYTES,
        )

    @property
    def model_store_ddc(self) -> str:
        """The model store there."""
        return self._upstream.upstream_store

    def path(self, via: Sequence[str]) -> list[Document]:
        """Return the model stores on the way up from there."""
        path = self._ask(_PATH, lambda: self._api.get_path(self.model_store_ddc, via))
        if not path:
            raise self._rubbish("get_path", "the way up is empty")
        return path[:MAX_PATH]

    def check_way_up(self, model_store_ddc: str) -> str:
        """Return the upstream node's id; raise UpstreamCycle if the way up from this model store leads back."""
        path = self.path([place(self._store.node_id, model_store_ddc)])
        way = [(self._store.node_id, model_store_ddc)] + [(each["node_id"], each["model_store_ddc"]) for each in path]
        if len(set(way)) < len(way):
            shown = " -> ".join(f"{name} at node {node_id[:8]}" for node_id, name in way)
            raise UpstreamCycle(
                f"The way up from {model_store_ddc} leads in a circle: {shown}; correct or remove one of the upstreams."
            )
        return str(path[0]["node_id"])

    def newest(self) -> tuple[Document, ForeignModel]:
        """Return the newest model that was aggregated there, or has come down to there; raise NotFound."""
        conditions = {"in": ["model_state", _BROUGHT_DOWN]}
        found = self._ask(_MODELS, lambda: self._api.get_models(self.model_store_ddc, conditions, limit=1))
        if not found:
            raise NotFound(f"{self} has no aggregated model yet; wait for one, or put one there.")
        return found[0], _MODEL.validate_python(found[0])

    def models(self, model_ids: Sequence[str]) -> list[Document]:
        """Return the model_infos of those of the models that are in the model store there."""
        conditions = {"in": ["model_id", list(model_ids[:_MAX_TERMS])]}
        return self._ask(_MODELS, lambda: self._api.get_models(self.model_store_ddc, conditions))

    def offer(self, model: Document) -> tuple[Document | None, tuple[Blob, ...]]:
        """Return the model's record there, or the blobs that have to be sent before there is one."""
        answer = self._ask(_ANSWER, lambda: self._api.offer_model(self.model_store_ddc, model))
        if (recorded := answer.get("model")) is None:
            missing = tuple(each.blob for each in _ANSWER.validate_python(answer).missing or ())
            if not missing:
                raise self._rubbish("offer_model", "there is neither a model nor a blob that is missing")
            return None, missing
        copy = self._check(_MODEL, lambda: recorded)
        same = ("model_hash", "model_size")
        if copy["model_state"] != ModelState.FEEDBACKED or any(copy[name] != model[name] for name in same):
            raise self._rubbish("offer_model", "its record is not that of the model")
        return copy, ()

    def send(self, blob: Blob, blocks: Callable[[], Iterator[bytes]]) -> None:
        """Send a blob; what goes wrong while it is read here is raised as it is."""
        failures: list[Exception] = []

        def noted() -> Iterator[bytes]:
            try:
                yield from blocks()
            except Exception as error:
                failures.append(error)
                raise

        try:
            with self._errors():
                self._api.put_blob(self.model_store_ddc, blob, noted)
        except FedChordError:
            if failures:
                raise failures[0] from None
            raise

    def fetch(self, model_id: str, blob: Blob) -> Iterator[bytes]:
        """Yield the blob's blocks; raise UpstreamUnavailable when other ones come."""
        with self._errors():
            received = self._api.receive_blob(self.model_store_ddc, model_id, blob.digest)
        with received:
            if received.size != blob.size:
                raise self._rubbish("load_model", f"blob {blob.digest} has {received.size} bytes, not {blob.size}")
            seconds = self._store.settings.upstream_timeout_seconds + blob.size / SLOWEST_BYTES_PER_SECOND
            ends_at = time.monotonic() + seconds
            while True:
                with self._errors():
                    block = next(received, b"")
                if not block:
                    return
                if time.monotonic() > ends_at:
                    raise UpstreamUnavailable(f"{self} did not send a blob within {seconds:.0f} s; try again later.")
                yield block

    def parties(self) -> list[Document]:
        """Return the parties that are registered there."""
        return self._ask(_PARTIES, lambda: self._api.get_parties(here=True))

    def register(self, party: Document, via: Sequence[str]) -> Document:
        """Register the party there and return its record."""
        return self._ask(_PARTY, lambda: self._api.register_party(**party, via=via))

    def unregister(self, id: str, via: Sequence[str]) -> int:
        """Take the party from there and return how many that were."""
        return self._ask(_COUNT, lambda: self._api.unregister_party(id, via))

    def __enter__(self) -> Self:
        """Return the neighbour."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections."""
        self._api.close()

    def __str__(self) -> str:
        """Return words for messages, without the keys."""
        return f"The upstream {self._upstream.alias!r} at {self._upstream.url}"

    def _ask(self, adapter: TypeAdapter[Any], call: Callable[[], Answer]) -> Answer:
        with self._errors():
            return self._check(adapter, call)

    def _check(self, adapter: TypeAdapter[Any], call: Callable[[], Answer]) -> Answer:
        """Return what the call returns, as it is, if it is what it should be."""
        answer = call()
        try:
            adapter.validate_python(answer)
            json.dumps(to_wire(answer), ensure_ascii=False, allow_nan=False).encode()  # some of it is told on
        except ValidationError as error:
            raise self._rubbish("the call", brief(error)) from error
        except (ValueError, RecursionError) as error:
            raise self._rubbish("the call", "it is not what JSON can hold") from error
        return answer

    def _rubbish(self, call: str, what: str) -> UpstreamUnavailable:
        return UpstreamUnavailable(
            f"{self} does not answer {call} as a model store does ({what}); check its URL and version."
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except UpstreamUnavailable:
            raise
        except Unavailable as error:
            raise UpstreamUnavailable(f"{self} cannot be used: {error.message}") from error
        except FedChordError as error:
            kind = UpstreamUnavailable if type(error) is FedChordError else type(error)
            raise kind(f"{self} says: {error.message}") from error


def place(node_id: str, model_store_ddc: str) -> str:
    """Return one text for a model store of a node, for `via`."""
    return f"{node_id} {model_store_ddc}"
