"""What the docs show of the model store runs as it stands there, against real services."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from common.errors import NotFound
from docs import method_meanings as meanings
from docs.methods import JSON_METHODS, example_request
from store.client import Api, set_logger
from store.wire import from_wire
from tests.servers import die_with_parent, free_ports

ROOT = Path(__file__).resolve().parents[2]
FEDCHORD = [sys.executable, "-c", "from coordinator.cli import main; main()"]
MODEL_STORE = "ddc:my_first_model_store"
CENTRE_STORE = "ddc:all_models"

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_SECONDS = 100


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Run a model store's service; lend its URL."""
    process = subprocess.Popen(
        [*FEDCHORD, "store", "serve", "--folder", str(folder), "--port", "0", "--json"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )
    try:
        assert process.stdout is not None
        said = ""
        while not said.rstrip().endswith("}"):
            line = process.stdout.readline()
            assert line, "the service has ended"
            said += line
        yield str(json.loads(said)["url"])
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def edge_and_centre(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Lend the URLs of two nodes; at the second something was aggregated."""
    with serving(tmp_path / "edge") as edge, serving(tmp_path / "centre") as centre:
        with Api(centre) as api:
            api.initialize_model_store(CENTRE_STORE)
            (tmp_path / "mean").write_bytes(b"a mean")
            api.put_aggregated_model(CENTRE_STORE, tmp_path / "mean")
        yield edge, centre


def is_model_info(value: Any) -> bool:
    return bool(value.keys() - {"tensors"} == meanings.DOCUMENTS["model_info"].keys())


def is_document(name: str) -> Callable[[Any], bool]:
    return lambda value: value.keys() == meanings.DOCUMENTS[name].keys()


KINDS: Mapping[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "number": lambda value: type(value) is int,
    "true or false": lambda value: isinstance(value, bool),
    "blocks of bytes": lambda value: isinstance(value, bytes),
    "model_info": is_model_info,
    "list of model_info": lambda value: len(value) > 0 and all(map(is_model_info, value)),
    "ddc_info": is_document("ddc_info"),
    "list of ddc_info": lambda value: len(value) > 0 and all(map(is_document("ddc_info"), value)),
    "upstream_info": is_document("upstream_info"),
    "list of upstream_info": lambda value: len(value) > 0 and all(map(is_document("upstream_info"), value)),
    "party_info": is_document("party_info"),
    "list of party_info": lambda value: len(value) > 0 and all(map(is_document("party_info"), value)),
    "list of lineage rows": lambda value: len(value) > 1 and all("parents" in each for each in value),
}


def test_every_example_of_the_reference_returns_what_the_reference_says(
    edge_and_centre: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edge, centre = edge_and_centre
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDCHORD_STORE_URL", edge)
    make_models(tmp_path)
    namespace: dict[str, Any] = {}
    exec("from store.client import Api\n\napi = Api()", namespace)
    results = {}
    for name in (name for names in meanings.METHODS.values() for name in names):
        if name == "get_latest_aggregated_model":
            assert namespace["result"]["model_id"] == namespace["aggregated_id"]  # the one that came last
        exec(meanings.EXAMPLES[name].replace("http://127.0.0.1:8791", centre), namespace)
        results[name] = namespace["result"]
        assert KINDS[meanings.RESULTS[name][0]](results[name]), (name, results[name])

    model_id, aggregated_id = namespace["model_id"], namespace["aggregated_id"]
    assert results["exists_store"] is results["exists_model"] is True
    assert results["load_model"] == b"model 1"
    assert results["get_model_info"]["model_id"] == model_id
    assert {each["model_id"] for each in results["get_models"]} > {model_id}
    assert results["get_latest_aggregated_model"]["model_id"] == aggregated_id
    assert [(each["model_id"], each["parents"]) for each in results["get_lineage"]] == [
        (aggregated_id, [model_id]), (model_id, []),
    ]  # fmt: skip
    sent = results["feedback"]
    assert (sent["model_store_ddc"], sent["model_state"], sent["hop_count"]) == (CENTRE_STORE, 20, 1)
    assert sent["model_hash"] == results["get_model_info"]["model_hash"]
    assert [each["model_id"] for each in results["get_latest_feedbacked_models"]] == [sent["model_id"]]
    taken = results["request_transfer"]
    assert (taken["model_store_ddc"], taken["model_state"]) == (MODEL_STORE, 40)
    assert taken["model_hash"] == results["proxy_request_transfer_info"]["model_hash"]
    assert results["get_latest_transferred_model"]["model_id"] == taken["model_id"]
    assert (results["create_party"]["hop_count"], results["create_party"]["description"]) == (1, "my experiment 1")
    assert isinstance(results["create_party"]["created_at"], datetime)
    assert [each["id"] for each in results["get_parties"]] == [results["create_party"]["id"]]
    assert {name: result for name, result in results.items() if name.startswith("delete_")} == {
        "delete_party": 1,
        "delete_upstream_info": 1,
        "delete_model": 1,
        "delete_all_model": 3,
        "delete_store": 1,
    }
    with Api(edge) as api, pytest.raises(NotFound):
        api.delete_store(MODEL_STORE)


def test_every_request_of_the_reference_is_answered_as_the_reference_says(
    edge_and_centre: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edge, centre = edge_and_centre
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDCHORD_STORE_URL", edge)
    make_models(tmp_path)
    known: dict[str, Any] = {}
    exec("from store.client import Api\n\napi = Api()", known)
    for name in (name for names in meanings.METHODS.values() for name in names):
        if f"fl.{name}" not in JSON_METHODS:
            exec(meanings.EXAMPLES[name], known)
            continue
        text = json.dumps(example_request(name)).replace("http://127.0.0.1:8791", centre)
        text = re.sub(r"<(\w+)>", lambda found: str(known[found[1]]), text)
        answer = post(centre if name == "get_latest_feedbacked_models" else edge, text)
        assert (set(answer), answer["id"]) == ({"jsonrpc", "result", "id"}, 1), (name, answer)
        result = from_wire(answer["result"])
        assert KINDS[meanings.RESULTS[name][0]](result), (name, result)
        if name in ("create_upstream_info", "create_party"):
            known[f"{name.split('_')[1]}_id"] = result["id"]


def post(url: str, text: str) -> dict[str, Any]:
    """Send a request as curl does; return the answer."""
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/jsonrpc", text.encode(), headers)) as response:
        return dict(json.loads(response.read()))


def make_models(folder: Path) -> None:
    """Write the files that the examples put."""
    (folder / "my_models").mkdir()
    (folder / "my_models" / "model_1").write_bytes(b"model 1")
    (folder / "my_models" / "aggregated_model_1").write_bytes(b"aggregated model 1")


@pytest.mark.parametrize(
    ("page", "until"), [("use-the-model-store.md", "## Let others in"), ("set-up-an-edge.md", "## With keys")]
)
def test_a_howto_runs_from_its_first_command_to_its_last(page: str, until: str, tmp_path: Path) -> None:
    text, found, _ = (ROOT / "docs" / "howto" / page).read_text("utf-8").partition(f"\n{until}\n")
    assert found, f"{page} has no section {until!r} any more"
    run(script(text), tmp_path)


def test_the_shell_commands_of_the_reference_run(tmp_path: Path) -> None:
    make_models(tmp_path)
    text = (ROOT / "docs" / "reference" / "model-store.md").read_text("utf-8")
    out = run(f"{SERVE}fedchord store create {MODEL_STORE}\n{script(text, {'sh'})}", tmp_path)
    assert out.count('"result":') == 2
    assert "error" not in out
    assert (tmp_path / "model_1").read_bytes() == b"model 1"


def test_opening_a_store_to_a_tenant_runs_as_the_howto_shows_it(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "howto" / "use-the-model-store.md").read_text("utf-8")
    _, _, keys = text.partition("\n## Let others in\n")
    out = run(f"{SERVE}fedchord store create ddc:digits\n{script(keys)}", tmp_path)
    assert "API key  " in out
    assert "clinic-a may read and write ddc:digits" in out


SERVE = "fedchord store serve --port 8790 &\nreachable 8790\n"
PREAMBLE = """\
set -euo pipefail
fedchord() { "$PYTHON" -c 'from coordinator.cli import main; main()' "$@"; }
newest() {  # the newest model of a service
    fedchord models list --limit 1 --json --url "$1" |
        "$PYTHON" -c 'import json, sys; print(json.load(sys.stdin)[0]["model_id"])'
}
reachable() {
    curl --silent --output health --retry 60 --retry-connrefused --retry-delay 1 "http://127.0.0.1:$1/health"
}
"""


def script(text: str, languages: Set[str] = frozenset({"sh", "python"})) -> str:
    """Return what a page shows, in its order, as one script; what runs in a second terminal goes to the background."""
    parts = []
    for indent, language, code in _FENCE.findall(text):
        if language not in languages:
            continue
        code = textwrap.dedent(code) if indent else code
        if language == "python":
            parts.append(f"\"$PYTHON\" - <<'PYTHON'\n{code}PYTHON\n")
        elif code.strip() == "fedchord store serve":
            parts.append(SERVE)
        else:
            for place, port in (("id", 8790), ("edge-id", 8791)):
                code = code.replace(f"<{place}>'", f'\'"$(newest http://127.0.0.1:{port})"')
                code = code.replace(f"<{place}>", f'"$(newest http://127.0.0.1:{port})"')
            parts.append(code)
    assert parts
    return "\n".join(parts)


def run(commands: str, folder: Path) -> str:
    """Run the script in the folder, its services at free ports, and return what it printed; stop what it started."""
    first, second = free_ports(2)
    text = (PREAMBLE + commands).replace("8790", str(first)).replace("8791", str(second))
    with (folder / "out").open("w") as printed:
        process = subprocess.Popen(
            ["bash", "-c", text],
            cwd=folder,
            env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        code = process.wait(timeout=_SECONDS)
    finally:
        with suppress(ProcessLookupError):  # if nothing of it is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    out = (folder / "out").read_text()
    assert code == 0, out
    return out


def test_the_logger_of_the_howto_gets_the_calls(
    edge_and_centre: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("your_logger")
    previous = logging.getLogger("store.client")
    set_logger(logger)
    try:
        with caplog.at_level(logging.DEBUG, "your_logger"), Api(edge_and_centre[0]) as api:
            api.initialize_model_store(MODEL_STORE)
            api.put_model(MODEL_STORE, __file__)
    finally:
        set_logger(previous)
    levels = {
        record.getMessage().split()[0]: record.levelname for record in caplog.records if record.name == logger.name
    }
    assert levels == {"fl.initialize_model_store": "DEBUG", "fl.put_model": "INFO"}
