"""Take files: `POST /jsonrpc/upload/<method>` with a multipart/form-data body, hashed while it goes to the disk."""

import asyncio
import logging
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from common.errors import BrokenUpload, DiskFull, FedChordError, InvalidInput, TooLarge
from store.blobs import BLOCK_BYTES, Blob
from store.database import reading, writing
from store.documents import model_document
from store.exchange.possession import record_received
from store.model_stores import check_access
from store.models import ModelState
from store.opening import OpenStore
from store.putting import NewModel, check_new_model, parse_meta, put_file
from store.service.access import Access
from store.service.answers import content_length, json_answer, pieces, refusal
from store.service.codes import METHOD_NOT_FOUND, Failure, failure_of
from store.service.forms import FILE, MAX_FIELD_BYTES, MAX_HEADER_BYTES, MAX_PARTS, UploadForm
from store.service.rpc import encode_result, parse
from store.service.threads import Threads
from store.tenants import Caller
from store.wire import to_wire

logger = logging.getLogger(__name__)

_STORE = "model_store_ddc"
_ID = "id"
_MODEL_FIELDS = frozenset(
    {
        _STORE,
        _ID,
        "model_kind",
        "model_description",
        "model_meta",
        "model_state",
        "round",
        "parents",
        "metrics",
        "num_examples",
    }
)
_BLOB_FIELDS = frozenset({_STORE, _ID, "digest", "size"})
_NUMBER = re.compile(r"-?[0-9]{1,18}")

Fields = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """What is done with one method's files."""

    names: frozenset[str]  # of the form's fields
    check: Callable[[OpenStore, Caller, Fields], None]  # of the fields that came before the file
    keep: Callable[[OpenStore, Caller, Fields, Path, Blob], object]  # returns the result


class Uploads:
    """The service's uploads."""

    def __init__(self, store: OpenStore, access: Access, *, short: Threads, long: Threads) -> None:
        self._store = store
        self._access = access
        self._short = short  # hash and write what came
        self._long = long  # put whole files into the object store
        self._max_file_bytes = int(store.settings.max_model_gigabytes * 10**9)
        self._max_field_bytes = MAX_FIELD_BYTES + 2 * (store.settings.max_meta_kilobytes << 10)
        self._max_body_bytes = self._max_file_bytes + self._max_field_bytes + MAX_PARTS * MAX_HEADER_BYTES

    async def __call__(self, request: Request) -> Response:
        """Take the file and answer as JSON-RPC does."""
        fields: dict[str, str] = {}  # filled while they come
        try:
            caller = await self._access.caller(request)
        except FedChordError as error:
            return self._access.refused(error)
        try:
            method = request.path_params["method"]
            if (upload := UPLOADS.get(method)) is None:
                return refusal(_unknown(method))
            result = await self._receive(request, caller, upload, fields)
            return json_answer(encode_result(_request_id(fields), to_wire(result)))
        except ClientDisconnect:
            logger.info("An upload was cut; nothing of it is kept", extra={"action": "upload_cut"})
            return Response(status_code=HTTPStatus.BAD_REQUEST)  # nobody reads it
        except Exception as error:  # whatever it is, the caller is told
            return refusal(failure_of(error), request_id=_request_id(fields))

    async def _receive(self, request: Request, caller: Caller, upload: Upload, fields: dict[str, str]) -> object:
        boundary = _boundary(request)
        length = content_length(request)
        if length > self._max_body_bytes:
            raise self._too_large(length)
        scratch = self._store.blobs.scratch()
        await self._short.run(_check_room, scratch, length)
        form = UploadForm(
            boundary,
            scratch / f"upload-{secrets.token_hex(16)}",
            fields,
            names=upload.names,
            max_field_bytes=self._max_field_bytes,
            max_file_bytes=self._max_file_bytes,
            on_file=partial(upload.check, self._store, caller),
        )
        try:
            await self._fill(form, request)
            blob = form.finish()
            return await self._long.run(upload.keep, self._store, caller, fields, form.path, blob)
        finally:
            await self._short.run(form.close)

    async def _fill(self, form: UploadForm, request: Request) -> None:
        """Feed the form in a thread while the next pieces come, of which as many are kept as it is fed at a time."""
        feeding: asyncio.Task[None] | None = None
        waiting: list[bytes] = []
        waiting_bytes = body_bytes = 0
        try:
            async for piece in pieces(request, self._store.settings.http_idle_seconds):
                waiting.append(piece)
                waiting_bytes += len(piece)
                body_bytes += len(piece)
                if body_bytes > self._max_body_bytes:  # what comes before and after the form has no other limit
                    raise self._too_large(body_bytes)
                if feeding is not None and feeding.done():
                    await feeding  # what it raises ends the upload at once
                if waiting_bytes >= BLOCK_BYTES:
                    if feeding is not None:
                        await feeding
                    feeding = asyncio.create_task(self._short.run(form.feed, waiting))
                    waiting, waiting_bytes = [], 0
        finally:
            if feeding is not None:
                await feeding
        await self._short.run(form.feed, waiting)

    def _too_large(self, num_bytes: int) -> TooLarge:
        return TooLarge(
            f"The upload has {num_bytes} bytes, but a model at most {self._max_file_bytes}; send a smaller one, or "
            "have FEDCHORD_MAX_MODEL_GIGABYTES raised."
        )


def _check_model(store: OpenStore, caller: Caller, fields: Fields) -> None:
    """Refuse, before the file comes, what can be known to be refused after it."""
    if _STORE in fields:
        _check_store(store, caller, fields)
    _new_model(store, caller, fields, ModelState.CREATED)


def _keep_model(
    state: ModelState, store: OpenStore, caller: Caller, fields: Fields, path: Path, blob: Blob
) -> dict[str, Any]:
    """Make the file a model; return its model_info."""
    name = _check_store(store, caller, fields)
    return model_document(put_file(store, name, path, blob, _new_model(store, caller, fields, state)))


def _check_blob(store: OpenStore, caller: Caller, fields: Fields) -> None:
    _check_store(store, caller, fields)  # servers send the fields first
    _announced(fields)


def _keep_blob(store: OpenStore, caller: Caller, fields: Fields, path: Path, blob: Blob) -> dict[str, Any]:
    """Keep the file for a model that the caller will offer; return its digest and size."""
    name = _check_store(store, caller, fields)
    if (announced := _announced(fields)) != blob:
        raise BrokenUpload(
            f"The file has {blob.size} bytes of digest {blob.digest}, but {announced.size} of digest "
            f"{announced.digest} were announced; send it again."
        )
    store.blobs.put(path, blob=blob)
    with writing(store.engine) as connection:
        check_access(connection, caller, name, write=True)  # the model store may be gone by now
        record_received(connection, caller, blob)
    return {"digest": blob.digest, "size": blob.size}


UPLOADS = {
    "fl.put_model": Upload(names=_MODEL_FIELDS, check=_check_model, keep=partial(_keep_model, ModelState.CREATED)),
    "fl.put_aggregated_model": Upload(
        names=_MODEL_FIELDS, check=_check_model, keep=partial(_keep_model, ModelState.AGGREGATED)
    ),
    "fl.put_blob": Upload(names=_BLOB_FIELDS, check=_check_blob, keep=_keep_blob),
}


def _check_store(store: OpenStore, caller: Caller, fields: Fields) -> str:
    """Return the model store's name; raise InvalidInput, NotFound or AccessDenied."""
    if _STORE not in fields:
        raise InvalidInput(f"Field {_STORE} is missing; give it.")
    with reading(store.engine) as connection:
        return check_access(connection, caller, fields[_STORE], write=True).name


def _new_model(store: OpenStore, caller: Caller, fields: Fields, state: ModelState) -> NewModel:
    number = _number(fields, "model_state")
    new = NewModel(
        model_kind=fields.get("model_kind", ""),
        model_description=fields.get("model_description", ""),
        model_meta=parse_meta(fields.get("model_meta") or "{}", store.settings),
        model_state=state if number is None else number,
        round=_number(fields, "round") or 0,
        parents=_parents(fields),
        metrics=parse_meta(fields.get("metrics") or "{}", store.settings, name="metrics"),
        num_examples=_number(fields, "num_examples"),
        tenant_id=caller.tenant_id,
    )
    check_new_model(store.settings, new)
    return new


def _number(fields: Fields, name: str) -> int | None:
    text = fields.get(name, "")
    if not text:
        return None
    if not _NUMBER.fullmatch(text):
        raise InvalidInput(f"Field {name} is {text[:80]!r}; write a whole number.")
    return int(text)


def _parents(fields: Fields) -> tuple[str, ...]:
    found = parse((fields.get("parents") or "[]").encode())
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise InvalidInput('Field parents is not a list of model ids; write it as JSON: ["…", "…"].')
    return tuple(found)


def _announced(fields: Fields) -> Blob:
    size = _number(fields, "size")
    if size is None:
        raise InvalidInput("Field size is missing; give the file's size in bytes.")
    return Blob(digest=fields.get("digest", ""), size=size)


def _request_id(fields: Fields) -> object:
    """Return the id to answer with: a number if it looks like one, else the text."""
    text = fields.get(_ID)
    return int(text) if text is not None and _NUMBER.fullmatch(text) else text


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("Content-Type"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidInput(
            f"Send the file as multipart/form-data with a boundary, in the part named {FILE!r} beside the fields."
        )
    return boundary


def _check_room(folder: Path, num_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if num_bytes >= free_bytes:
        raise DiskFull(f"The upload has {num_bytes} bytes, but the disk has only {free_bytes} left; free some space.")


def _unknown(method: str) -> Failure:
    return Failure(
        code=METHOD_NOT_FOUND,
        message="Method not found",
        data=f"There is no upload {method[:80]!r}; there are: {', '.join(UPLOADS)}.",
        status=HTTPStatus.NOT_FOUND,
    )
