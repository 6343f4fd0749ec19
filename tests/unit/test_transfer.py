"""Transfers arrive whole over a bad line, and a hostile reference leads nowhere."""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path

import pytest
from blake3 import blake3

from common.errors import Declined, InvalidInput, NotFound, StoreUnavailable
from store.blobs import BLOCK_BYTES, Blob
from store.file_locks import open_alone
from store.transfer import Transfer
from tests.servers import free_ports, wait_for

DATA = os.urandom(3 * BLOCK_BYTES + 77)
WRONG = bytes([DATA[0] ^ 1]) + DATA[1:]
BLOB = Blob(digest=blake3(DATA).hexdigest(), size=len(DATA))


@dataclass
class Script:
    """Say what the server does, and note what it was asked."""

    answers: list[Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=list)  # one for each request
    asked: list[str] = field(default_factory=list)  # method and Range or If-None-Match of each request
    written: list[bytes] = field(default_factory=list)  # the bodies of requests
    cut_uploads_at: list[int] = field(default_factory=list)  # after so many bytes; one for each of the next uploads
    url: str = ""


@pytest.fixture
def script() -> Iterator[Script]:
    plan = Script()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            plan.asked.append(f"GET {self.headers.get('Range', 'all')}")
            plan.answers.pop(0)(self)

        def do_PUT(self) -> None:
            plan.asked.append(f"PUT {self.headers.get('If-None-Match')}")
            if plan.cut_uploads_at:
                self.rfile.read(plan.cut_uploads_at.pop(0))
                self.close_connection = True
                return
            plan.written.append(self.rfile.read(int(self.headers["Content-Length"])))
            plan.answers.pop(0)(self)

        def log_message(self, format: str, *args: object) -> None:
            logging.getLogger(__name__).debug(format, *args)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            logging.getLogger(__name__).debug("the client left", exc_info=True)

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        plan.url = f"http://127.0.0.1:{server.server_address[1]}/bucket/blobs/x?X-Amz-Signature=secret"
        yield plan
        server.shutdown()
        thread.join()


@pytest.fixture
def transfer(tmp_path: Path) -> Iterator[Transfer]:
    shared = tmp_path / "shared"
    shared.mkdir()
    with Transfer(shared_folder=shared, timeout_seconds=0.5, patience_seconds=0.3, pause_seconds=0.01) as opened:
        yield opened


def send(
    data: bytes = DATA, *, ranges: bool = True, cut_at: int | None = None, shift: int = 0, hang: bool = False
) -> Callable[[BaseHTTPRequestHandler], None]:
    """Answer with the data, or from the offset that is asked for, and perhaps cut it."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        begin = int(wanted.group(1)) if wanted and ranges else 0
        handler.send_response(206 if wanted and ranges else 200)
        handler.send_header("Content-Length", str(len(data) - begin))
        if wanted and ranges:
            handler.send_header("Content-Range", f"bytes {begin + shift}-{len(data) - 1}/{len(data)}")
        handler.end_headers()
        handler.wfile.write(data[begin : None if cut_at is None else cut_at])
        handler.wfile.flush()
        if hang:
            handler.rfile.read(1)  # until the client gives up
        if cut_at is not None:
            handler.close_connection = True

    return answer


def status(code: int, body: bytes = b"", **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        if 300 <= code < 400:
            handler.send_header("Location", "http://127.0.0.1:1/elsewhere")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def drip(data: bytes, *, seconds: float) -> Callable[[BaseHTTPRequestHandler], None]:
    """Answer one byte at a time."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        for position in range(len(data)):
            time.sleep(seconds)
            handler.wfile.write(data[position : position + 1])
            handler.wfile.flush()

    return answer


def actions(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged of stores that are away or back."""
    found = [str(getattr(record, "action", "")) for record in caplog.records]
    return [action for action in found if action.startswith("store_")]


def cut(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection without an answer."""
    handler.close_connection = True


# --- fetching ------------------------------------------------------------------------------------------------------


def test_a_cut_download_goes_on_where_it_was_cut(script: Script, transfer: Transfer, tmp_path: Path) -> None:
    first, second = BLOCK_BYTES + 100, 2 * BLOCK_BYTES + 5000
    script.answers = [cut, send(cut_at=first), status(503), send(cut_at=second), send()]
    path = transfer.fetch(script.url, BLOB, tmp_path)
    assert path.read_bytes() == DATA
    assert script.asked[0:2] == ["GET all", "GET all"]
    begins = [int(asked.removeprefix("GET bytes=").removesuffix("-")) for asked in script.asked[2:]]
    assert begins == [first, first, second]


def test_a_server_without_ranges_is_read_from_the_beginning(script: Script, transfer: Transfer, tmp_path: Path) -> None:
    script.answers = [send(cut_at=BLOCK_BYTES + 100), send(ranges=False)]
    assert transfer.fetch(script.url, BLOB, tmp_path).read_bytes() == DATA


@pytest.mark.parametrize("odd", [send(shift=1), status(416)])
def test_an_odd_answer_to_a_range_starts_again(
    script: Script, transfer: Transfer, tmp_path: Path, odd: Callable[[BaseHTTPRequestHandler], None]
) -> None:
    script.answers = [send(cut_at=BLOCK_BYTES + 100), odd, send()]
    assert transfer.fetch(script.url, BLOB, tmp_path).read_bytes() == DATA
    assert script.asked[-1] == "GET all"


def test_a_server_that_falls_silent_is_asked_again(script: Script, transfer: Transfer, tmp_path: Path) -> None:
    script.answers = [send(cut_at=1000, hang=True), send()]
    assert transfer.fetch(script.url, BLOB, tmp_path).read_bytes() == DATA


def test_progress_renews_patience(script: Script, transfer: Transfer, tmp_path: Path) -> None:
    long = os.urandom(100_000)
    blob = Blob(digest=blake3(long).hexdigest(), size=len(long))
    cuts = list(range(1000, 100_000, 1000))  # the pauses between so many attempts are more than patience lasts
    script.answers = [*[send(long, cut_at=position) for position in cuts], send(long)]
    assert transfer.fetch(script.url, blob, tmp_path).read_bytes() == long
    assert script.asked == ["GET all", *[f"GET bytes={position}-" for position in cuts]]


def test_a_drip_is_not_a_silence(script: Script, transfer: Transfer, tmp_path: Path) -> None:
    seen: list[int] = []
    data = DATA[:12]
    blob = Blob(digest=blake3(data).hexdigest(), size=len(data))
    script.answers = [drip(data, seconds=0.1)]  # longer than the time-out in all, and than patience
    assert transfer.fetch(script.url, blob, tmp_path, watch=seen.append).read_bytes() == data
    assert seen == list(range(13))


def test_a_download_goes_on_after_its_process_has_ended(script: Script, transfer: Transfer, tmp_path: Path) -> None:
    def stop(position: int) -> None:
        if position > BLOCK_BYTES:
            raise KeyboardInterrupt

    script.answers = [send(), send()]
    with pytest.raises(KeyboardInterrupt):
        transfer.fetch(script.url, BLOB, tmp_path / "site", watch=stop)
    (part,) = (tmp_path / "site").iterdir()
    there = part.stat().st_size
    assert BLOCK_BYTES < there < BLOB.size
    assert transfer.fetch(script.url, BLOB, tmp_path / "site").read_bytes() == DATA
    assert script.asked == ["GET all", f"GET bytes={there}-"]
    assert [path.name for path in (tmp_path / "site").iterdir()] == [BLOB.digest]


@pytest.mark.parametrize(
    ("left", "asked"),
    [
        (DATA, []),  # killed between the last byte and the rename
        (DATA[:5], ["GET bytes=5-"]),
        (b"", ["GET all"]),
        (WRONG[:5], ["GET bytes=5-", "GET all"]),
        (WRONG, ["GET all"]),
        (DATA + b"?", ["GET all"]),
    ],
    ids=["all", "some", "none", "wrong", "all wrong", "more"],
)
def test_what_an_earlier_process_has_left_is_verified(
    script: Script, transfer: Transfer, tmp_path: Path, left: bytes, asked: list[str]
) -> None:
    (tmp_path / f".{BLOB.digest}.part").write_bytes(left)
    script.answers = [send()] * 2
    assert transfer.fetch(script.url, BLOB, tmp_path).read_bytes() == DATA
    assert script.asked == asked
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [BLOB.digest]


def test_two_processes_do_not_write_one_file(script: Script, transfer: Transfer, tmp_path: Path) -> None:
    part = tmp_path / f".{BLOB.digest}.part"
    other = open_alone(part)
    assert other is not None
    with other:
        script.answers = [send()]
        assert transfer.fetch(script.url, BLOB, tmp_path).read_bytes() == DATA
        assert part.read_bytes() == b""


def test_flipped_bits_are_fetched_again(script: Script, transfer: Transfer, tmp_path: Path) -> None:
    script.answers = [send(DATA[:-1] + bytes([DATA[-1] ^ 1])), send()]
    assert transfer.fetch(script.url, BLOB, tmp_path).read_bytes() == DATA


@pytest.mark.parametrize("wrong", [DATA + b"1", DATA[:-1] + bytes([DATA[-1] ^ 1])])
def test_other_bytes_than_promised_are_an_error_and_no_file(
    script: Script, transfer: Transfer, tmp_path: Path, wrong: bytes
) -> None:
    script.answers = [send(wrong, ranges=False)] * 3
    with pytest.raises(StoreUnavailable, match=f"other bytes than the coordinator promised, 3 times.*{BLOB.digest}"):
        transfer.fetch(script.url, BLOB, tmp_path / "site")
    assert list((tmp_path / "site").iterdir()) == []


@pytest.mark.parametrize("short", [DATA[:-1], b""])
def test_fewer_bytes_than_promised_are_an_error_and_stay_to_be_built_on(
    script: Script, transfer: Transfer, tmp_path: Path, short: bytes
) -> None:
    script.answers = [send(short, ranges=False)] * 99
    with pytest.raises(StoreUnavailable, match=f"only {len(short)} of {BLOB.size} bytes came"):
        transfer.fetch(script.url, BLOB, tmp_path / "site")
    assert [path.stat().st_size for path in (tmp_path / "site").iterdir()] == ([len(short)] if short else [])


def test_an_empty_blob_is_fetched(script: Script, transfer: Transfer, tmp_path: Path) -> None:
    script.answers = [send(b"")]
    assert transfer.fetch(script.url, Blob(digest=blake3().hexdigest(), size=0), tmp_path).read_bytes() == b""


@pytest.mark.parametrize("there", [True, False])
def test_a_file_that_is_there_is_verified_before_it_is_used(
    script: Script, transfer: Transfer, tmp_path: Path, there: bool
) -> None:
    (tmp_path / BLOB.digest).write_bytes(DATA if there else WRONG)
    script.answers = [send()]
    assert transfer.fetch(script.url, BLOB, tmp_path).read_bytes() == DATA
    assert len(script.asked) == (0 if there else 1)


@pytest.mark.parametrize(
    ("code", "error", "sentence"),
    [
        (403, StoreUnavailable, r"403 AccessDenied\): it has expired"),
        (401, StoreUnavailable, "it has expired"),
        (404, NotFound, "There is nothing at"),
        (302, StoreUnavailable, "answered 302"),
        (501, StoreUnavailable, "answered 501"),
    ],
)
def test_a_refusal_is_not_repeated_and_says_what_to_do(
    script: Script, transfer: Transfer, tmp_path: Path, code: int, error: type[Exception], sentence: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    script.answers = [status(code, b"<Error><Code>AccessDenied</Code></Error>")] * 2
    for use in (lambda: transfer.fetch(script.url, BLOB, tmp_path / "site"), lambda: transfer.upload(path, script.url)):
        with pytest.raises(error, match=sentence) as caught:
            use()
        assert "secret" not in str(caught.value)
    assert len(script.asked) == 2


def test_a_store_that_stays_away_is_given_up_when_patience_ends_and_said_once(
    script: Script, transfer: Transfer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script.answers = [status(503)] * 99
    with pytest.raises(StoreUnavailable, match=r"has not got on for 0 s \(the answer was 503"):
        transfer.fetch(script.url, BLOB, tmp_path)
    assert len(script.asked) > 3
    assert actions(caplog) == ["store_away"]
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}/x?X-Amz-Signature=secret"
    with pytest.raises(StoreUnavailable, match="has not got on") as caught:
        transfer.fetch(nobody, BLOB, tmp_path)
    assert actions(caplog) == ["store_away"] * 2  # another host
    assert "secret" not in caplog.text + str(caught.value)


@pytest.mark.parametrize("down", [True, False])
def test_a_store_that_is_away_for_a_while_is_waited_for_and_both_are_said_once(
    script: Script, tmp_path: Path, caplog: pytest.LogCaptureFixture, down: bool
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "file").write_bytes(DATA)
    script.answers = [*[cut] * 3, *[status(503)] * 3, send() if down else status(200)]
    with Transfer(shared_folder=None, timeout_seconds=0.5, patience_seconds=30, pause_seconds=0.01) as transfer:
        if down:
            assert transfer.fetch(script.url, BLOB, tmp_path / "site").read_bytes() == DATA
        else:
            transfer.upload(tmp_path / "file", script.url)
    assert len(script.asked) == 7
    assert actions(caplog) == ["store_away", "store_back"]


def test_a_store_that_asks_for_a_pause_gets_it(script: Script, tmp_path: Path) -> None:
    script.answers = [status(503, Retry_After="1"), send()]
    with Transfer(shared_folder=None, timeout_seconds=0.5, patience_seconds=30, pause_seconds=0.01) as transfer:
        begun = time.monotonic()
        assert transfer.fetch(script.url, BLOB, tmp_path).read_bytes() == DATA
    assert 1 <= time.monotonic() - begun < 10


def test_a_store_whose_port_is_closed_for_a_while_is_waited_for(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    asked: list[int] = []

    def watch(position: int) -> None:
        asked.append(position)
        if len(asked) == 5:  # several attempts were refused
            (tmp_path / "ready").touch()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            send()(self)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    def serve() -> None:
        wait_for((tmp_path / "ready").exists, seconds=20, what="attempts in vain")
        with HTTPServer(("127.0.0.1", port), Handler) as server:
            server.handle_request()

    thread = threading.Thread(target=serve)
    thread.start()
    with Transfer(shared_folder=None, timeout_seconds=0.5, patience_seconds=30, pause_seconds=0.05) as transfer:
        path = transfer.fetch(f"http://127.0.0.1:{port}/x", BLOB, tmp_path / "site", watch=watch)
    thread.join()
    assert path.read_bytes() == DATA


@pytest.mark.parametrize("down", [True, False])
def test_a_watch_ends_a_transfer_that_is_waiting(script: Script, tmp_path: Path, down: bool) -> None:
    def watch(_: int) -> None:
        if len(script.asked) == 2:
            raise Declined("The part is not wanted any more.")

    (tmp_path / "file").write_bytes(DATA)
    script.answers = [status(503)] * 99
    with Transfer(shared_folder=None, timeout_seconds=0.5, patience_seconds=600, pause_seconds=0.01) as transfer:
        fetch = partial(transfer.fetch, script.url, BLOB, tmp_path / "site", watch=watch)
        upload = partial(transfer.upload, tmp_path / "file", script.url, watch=watch)
        with pytest.raises(Declined, match="not wanted"):
            (fetch if down else upload)()
    assert len(script.asked) == 2


def test_a_reference_that_is_no_address_is_not_repeated(transfer: Transfer, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no URL"):
        transfer.fetch("http://a..b:99999/x", BLOB, tmp_path)


# --- uploading -----------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    written = tmp_path / "update"
    written.write_bytes(DATA)
    return written


def test_an_upload_is_repeated_whole_until_it_is_taken(script: Script, transfer: Transfer, path: Path) -> None:
    script.answers = [cut, status(503), status(200)]
    transfer.upload(path, script.url)
    assert script.asked == ["PUT *"] * 3
    assert script.written == [DATA] * 3


def test_an_upload_that_is_cut_in_its_middle_is_repeated_whole(
    script: Script, transfer: Transfer, tmp_path: Path
) -> None:
    path = tmp_path / "large"
    path.write_bytes(data := os.urandom(20 * BLOCK_BYTES))
    seen: list[int] = []
    script.cut_uploads_at = [BLOCK_BYTES, 5 * BLOCK_BYTES, 9 * BLOCK_BYTES]
    script.answers = [status(200)]
    transfer.upload(path, script.url, watch=seen.append)
    assert script.asked == ["PUT *"] * 4
    assert script.written[-1] == data
    assert seen[-1] == len(data)


def test_an_upload_whose_answer_was_lost_is_done(script: Script, transfer: Transfer, path: Path) -> None:
    script.answers = [cut, status(412)]
    transfer.upload(path, script.url)
    assert len(script.asked) == 2


def test_an_empty_file_is_uploaded(script: Script, transfer: Transfer, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    script.answers = [status(204)]
    transfer.upload(tmp_path / "empty", script.url)
    assert script.written == [b""]


def test_connections_are_used_again(script: Script, transfer: Transfer, tmp_path: Path, path: Path) -> None:
    peers = set()

    def note(answer: Callable[[BaseHTTPRequestHandler], None]) -> Callable[[BaseHTTPRequestHandler], None]:
        def noted(handler: BaseHTTPRequestHandler) -> None:
            peers.add(handler.client_address)
            answer(handler)

        return noted

    script.answers = [note(send()), note(status(200)), note(status(412)), note(send())]
    transfer.fetch(script.url, BLOB, tmp_path / "one")
    transfer.upload(path, script.url)
    transfer.upload(path, script.url)
    transfer.fetch(script.url, BLOB, tmp_path / "two")
    assert len(peers) == 1


# --- references into a shared folder -------------------------------------------------------------------------------


def test_what_is_shared_is_fetched_without_a_copy(transfer: Transfer, tmp_path: Path) -> None:
    granted = tmp_path / "shared" / "granted"
    granted.write_bytes(DATA)
    path = transfer.fetch(granted.as_uri(), BLOB, tmp_path / "site")
    assert path.samefile(granted)


def test_what_cannot_be_linked_is_copied(
    transfer: Transfer, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    granted = tmp_path / "shared" / "granted"
    granted.write_bytes(DATA)
    link = os.link

    def same_folder_only(source: Path, target: Path, **options: bool) -> None:  # as from one disk to another
        if Path(source).parent != Path(target).parent:
            raise OSError(18, "Invalid cross-device link")
        link(source, target, **options)

    monkeypatch.setattr(os, "link", same_folder_only)
    fetched = transfer.fetch(granted.as_uri(), BLOB, tmp_path / "site")
    body = tmp_path / "shared" / "body"
    transfer.upload(path, body.as_uri())
    transfer.upload(granted, body.as_uri())  # the first stays
    assert (fetched.read_bytes(), body.read_bytes()) == (DATA, DATA)
    assert not fetched.samefile(granted)
    assert not body.samefile(path)
    assert {entry.name for entry in (tmp_path / "shared").iterdir()} == {"granted", "body"}


def test_what_was_uploaded_first_stays(transfer: Transfer, tmp_path: Path, path: Path) -> None:
    body = tmp_path / "shared" / "body"
    transfer.upload(path, body.as_uri())
    second = tmp_path / "second"
    second.write_bytes(b"second")
    transfer.upload(second, body.as_uri())
    assert body.read_bytes() == DATA


def test_shared_bytes_that_are_not_the_blob_are_refused(transfer: Transfer, tmp_path: Path) -> None:
    granted = tmp_path / "shared" / "granted"
    granted.write_bytes(b"other")
    with pytest.raises(StoreUnavailable, match="is not blob"):
        transfer.fetch(granted.as_uri(), BLOB, tmp_path / "site")
    assert list((tmp_path / "site").iterdir()) == []


def test_a_shared_reference_that_has_ended_says_so(transfer: Transfer, tmp_path: Path, path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="has expired"):
        transfer.fetch((tmp_path / "shared" / "gone").as_uri(), BLOB, tmp_path / "site")
    with pytest.raises(StoreUnavailable, match="has expired"):
        transfer.upload(path, (tmp_path / "shared" / "gone" / "body").as_uri())


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_shared_name_that_is_no_plain_file_is_refused(transfer: Transfer, tmp_path: Path, kind: str) -> None:
    (tmp_path / "secret").write_bytes(DATA)
    odd = tmp_path / "shared" / "odd"
    if kind == "link":
        odd.symlink_to(tmp_path / "secret")
    elif kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.mkdir()
    with pytest.raises(InvalidInput, match="not a plain file"):
        transfer.fetch(odd.as_uri(), BLOB, tmp_path / "site")
    assert list((tmp_path / "site").iterdir()) == []


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "file:",
        "file:///etc/passwd",
        "file://{shared}/../secret",
        "file://{shared}/%2e%2e/secret",
        "file://{shared}/way-out/secret",
        "file://{shared}-not/secret",
        "file://{shared}/..",
        "file://host/{shared}/granted",
        "file://{shared}/a%00b",
        "ftp://127.0.0.1/x",
        "http:///x",
        "http://[::1/x",
        "data:,x",
    ],
)
def test_a_reference_that_leads_elsewhere_is_refused(transfer: Transfer, tmp_path: Path, path: Path, url: str) -> None:
    (tmp_path / "secret").write_bytes(DATA)
    (tmp_path / "shared" / "way-out").symlink_to(tmp_path)
    before = set(tmp_path.rglob("*"))
    url = url.format(shared=tmp_path / "shared")
    for use in (lambda: transfer.fetch(url, BLOB, tmp_path / "site"), lambda: transfer.upload(path, url)):
        with pytest.raises(InvalidInput):
            use()
    assert set(tmp_path.rglob("*")) == before


def test_without_a_shared_folder_no_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    with (
        Transfer(shared_folder=None, timeout_seconds=1) as transfer,
        pytest.raises(InvalidInput, match="shared folder"),
    ):
        transfer.fetch((tmp_path / "file").as_uri(), BLOB, tmp_path / "site")
