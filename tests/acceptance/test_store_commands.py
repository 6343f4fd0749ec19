"""The commands `store` and `models`: on the records of a folder and over a service, as real processes."""

import contextlib
import io
import json
import logging
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from coordinator.cli import main
from tests.workplace import Ended, Workplace, wait_for

DDC = "ddc:my_first_model_store"


class Here(Workplace):
    """A workplace whose commands run in this process, unless they are started: that takes longer than most of them."""

    def run(self, *arguments: str, code: int = 0, seconds: float = 100, largest_file: int | None = None) -> Ended:
        """Run the command to its end; fail unless it ends with the code."""
        assert largest_file is None
        out, err = io.StringIO(), io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            patch.setattr(sys, "argv", ["fedchord", *arguments])
            patch.setattr(logging.root, "handlers", [])  # which a command sets up anew
            patch.setattr(logging.root, "level", logging.WARNING)
            with pytest.raises(SystemExit) as ended:
                main()
        found = Ended(code=int(ended.value.code or 0), out=out.getvalue(), err=err.getvalue())
        assert found.code == code, found
        return found


@dataclass(frozen=True, kw_only=True)
class Place:
    """Somebody's folder, and how the commands reach a model store from it."""

    workplace: Workplace
    url: str | None  # of the service; None for the records in the folder

    @property
    def folder(self) -> Path:
        """Where the commands run."""
        return self.workplace.folder

    def run(self, *arguments: str, code: int = 0) -> Ended:
        """Run a command that knows --url to its end."""
        there = () if self.url is None else ("--url", self.url)
        return self.workplace.run(*arguments, *there, code=code)


@contextlib.contextmanager
def serving(workplace: Workplace, *options: str) -> Iterator[dict[str, Any]]:
    """Run `store serve` in the workplace; lend what it says when it is ready."""
    process = workplace.start("store", "serve", "--port", "0", "--json", *options)
    try:
        yield read_json(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.communicate()


def read_json(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return the JSON object that a process prints first."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line.rstrip() == "}":
            return dict(json.loads("".join(lines)))
    raise AssertionError(process.communicate())


def make_workplace(folder: Path) -> Workplace:
    folder.mkdir(parents=True, exist_ok=True)
    return Here(folder)


@pytest.fixture(scope="module", params=["records", "service"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Lend a folder with a model store, and a folder without one beside its service."""
    home = make_workplace(tmp_path_factory.mktemp("home"))
    with serving(home) as said:
        if request.param == "records":
            yield Place(workplace=home, url=None)
        else:
            yield Place(workplace=make_workplace(tmp_path_factory.mktemp("away")), url=said["url"])


@pytest.fixture
def ddc(place: Place, request: pytest.FixtureRequest) -> str:
    """Lend the name of an empty model store."""
    name = f"ddc:{request.node.originalname.removeprefix('test_')[:60]}"
    place.run("store", "create", name)
    return name


def put(place: Place, ddc: str, content: bytes, *options: str, name: str = "model_1") -> dict[str, Any]:
    (place.folder / name).write_bytes(content)
    return dict(place.run("models", "put", ddc, name, *options, "--json").json)


def test_a_model_store_is_created_listed_and_deleted(place: Place) -> None:
    created = place.run("store", "create", DDC, "--json").json
    assert created["model_store_ddc"] == DDC
    assert place.run("store", "create", DDC, "--json").json["id"] == created["id"]
    assert DDC in [each["model_store_ddc"] for each in place.run("store", "--json").json]
    assert DDC in place.run("store", "list").out
    put(place, DDC, b"a model")
    assert "--force" in place.run("store", "delete", DDC, code=4).err
    assert place.run("store", "delete", DDC, "--force", "--json").json == {"model_store_ddc": DDC, "deleted": 1}
    assert "ddc:" in place.run("store", "delete", DDC, code=3).err


def test_what_was_put_is_shown_and_comes_back(place: Place, ddc: str) -> None:
    content = os.urandom(3_000_000)
    meta = {"additional": {"of": ["any", "kind", 1.5, None]}}
    model = put(place, ddc, content, "--kind", "weights", "--description", "test model", "--meta", json.dumps(meta))
    assert (model["model_kind"], model["model_description"], model["model_meta"]) == ("weights", "test model", meta)
    assert (model["model_state"], model["model_size"], model["round"]) == (10, len(content), 0)
    short = model["model_id"][:8]
    shown = place.run("models", "show", short, "--json").json
    assert {name: shown[name] for name in model} == model
    assert "weights" in place.run("models", "show", short).out
    files = place.run("models", "get", short, "--json").json["files"]
    assert files == ["model.bin"]
    assert (place.folder / "model.bin").read_bytes() == content
    assert "is there already" in place.run("models", "get", short, code=2).err
    place.run("models", "get", short, "--force")
    assert "without tensors" in place.run("models", "get", short, "--shards", code=2).err
    assert not (place.folder / "model").exists()
    (place.folder / "model.bin").unlink()


def test_models_are_listed_by_what_they_are(place: Place, ddc: str) -> None:
    first = put(place, ddc, b"1", "--kind", "global", "--round", "1", "--aggregated", "--examples", "7")
    second = put(
        place, ddc, b"2", "--kind", "global", "--round", "2", "--aggregated", "--parent", first["model_id"][:8]
    )
    third = put(place, ddc, b"3", "--kind", "update", "--round", "2")
    assert (first["num_examples"], second["parents"]) == (7, [first["model_id"]])

    def listed(*options: str) -> list[str]:
        found = place.run("models", "list", "--store", ddc, "--json", *options).json
        return [model["model_id"] for model in found]

    ids = [third["model_id"], second["model_id"], first["model_id"]]
    assert listed() == ids
    assert listed("--limit", "1") == ids[:1]
    assert listed("--kind", "global") == ids[1:]
    assert listed("--state", "aggregated", "--round", "2") == [ids[1]]
    assert listed("--round", "2") == ids[:2]
    assert listed("--state", "transferred") == []
    assert listed("--job", "3f9a") == []
    everywhere = [model["model_id"] for model in place.run("models", "--json").json]
    assert [each for each in everywhere if each in ids] == ids
    assert [line.split()[0] for line in place.run("models", "--store", ddc).out.splitlines()[1:]] == [
        each[:8] for each in ids
    ]


def test_a_safetensors_file_has_tensors_and_comes_back_whole_or_in_shards(place: Place, ddc: str) -> None:
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a.bias": np.ones(2, np.float16),
    }
    model = put(place, ddc, safetensors.numpy.save(tensors), name="some.safetensors")
    shown = place.run("models", "show", model["model_id"], "--json").json
    assert shown["tensors"] == {
        "a.bias": {"dtype": "F16", "shape": [2]},
        "a.weight": {"dtype": "F32", "shape": [2, 3]},
    }
    assert "2, 3" in place.run("models", "show", model["model_id"]).out
    place.run("models", "get", model["model_id"], "-o", "back.safetensors")
    back = safetensors.numpy.load_file(place.folder / "back.safetensors")
    assert {name: array.tolist() for name, array in back.items()} == {
        name: array.tolist() for name, array in tensors.items()
    }
    files = place.run("models", "get", model["model_id"], "--shards", "-o", "parts", "--json").json["files"]
    assert sorted(Path(file).name for file in files) == [
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((place.folder / "parts" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert safetensors.numpy.load_file(place.folder / "parts" / "model-00001-of-00001.safetensors").keys() == set(
        tensors
    )


def test_an_id_may_be_shortened_to_what_is_unique(place: Place, ddc: str) -> None:
    ids = [put(place, ddc, b"a model")["model_id"] for _ in range(17)]  # there are 16 digits to begin with
    shared = next(each[0] for each in ids if sum(other[0] == each[0] for other in ids) > 1)
    assert "More than one model" in place.run("models", "show", shared, "--store", ddc, code=3).err
    unique = next(length for length in range(1, 37) if sum(other[:length] == ids[0][:length] for other in ids) == 1)
    shown = place.run("models", "show", ids[0][:unique], "--store", ddc, "--json").json
    assert shown["model_id"] == ids[0]


def test_a_deleted_model_is_gone(place: Place, ddc: str) -> None:
    model = put(place, ddc, b"short-lived")
    assert place.run("models", "delete", model["model_id"][:8], "--json").json["deleted"] is True
    assert "no model" in place.run("models", "show", model["model_id"], code=3).err
    assert "no model" in place.run("models", "delete", model["model_id"], code=3).err


def test_the_lineage_of_what_was_put_leads_back_to_the_first(place: Place, ddc: str) -> None:
    first = put(place, ddc, b"one")["model_id"]
    second = put(place, ddc, b"two", "--parent", first)["model_id"]
    third = put(place, ddc, b"three", "--parent", second, "--parent", first, "--kind", "mix")["model_id"]
    listed = place.run("models", "lineage", third[:8], "--json").json
    assert {each["model_id"]: each["parents"] for each in listed} == {
        third: [second, first], second: [first], first: [],
    }  # fmt: skip
    assert listed[0]["model_id"] == third
    lines = place.run("models", "lineage", third).out.splitlines()
    assert lines[0].startswith(f"{third[:8]}  mix")
    assert f"put into {ddc}" in lines[1]
    place.run("models", "delete", first)
    deleted = [each for each in place.run("models", "lineage", third, "--json").json if each["model_id"] == first]
    assert [(each["model_store_ddc"], each["parents"]) for each in deleted] == [(None, [])]
    assert "deleted" in place.run("models", "lineage", third).out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["models", "show", "no-such-model"], 3, "no model"),
        (["models", "show", "100%"], 2, "is no id"),
        (["models", "get"], 2, "--job"),
        (["models", "get", "--job", "3f9a"], 3, "global model yet"),
        (["models", "put", "ddc:nowhere", "counting.py"], 3, "ddc:nowhere"),
        (["models", "put", DDC, "no-such-file"], 2, "no-such-file"),
        (["models", "put", DDC, "counting.py", "--meta", "[1]"], 2, "object"),
        (["models", "put", DDC, "counting.py", "--meta", "{"], 2, "JSON"),
        (["models", "list", "--store", "ddc:nowhere"], 3, "ddc:nowhere"),
        (["store", "create", "ddc:../up"], 2, "ddc:"),
        (["store", "create", "digits"], 2, "ddc:"),
        (["store", "feedback", "ddc:nowhere", "3f9a"], 3, "ddc:nowhere"),
        (["store", "upstreams", "remove", "3f9a"], 3, "no upstream"),
        (["store", "parties", "remove", "3f9a"], 3, "no party"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(place: Place, arguments: list[str], code: int, words: str) -> None:
    place.run("store", "create", DDC)
    ended = place.run(*arguments, code=code)
    assert ended.out == ""
    assert len(ended.err.splitlines()) == 1
    assert ended.err.startswith("fedchord: ")
    assert words in ended.err


def test_a_transfer_shows_how_far_it_is_on_a_terminal_only(place: Place, ddc: str) -> None:
    model = put(place, ddc, bytes(2_000_000), name="big-file")
    there = [] if place.url is None else ["--url", place.url]
    shown = on_a_terminal(place.folder, ["models", "put", ddc, "big-file", *there])
    assert "big-file" in shown
    assert "MB" in shown
    shown = on_a_terminal(place.folder, ["models", "get", model["model_id"], "-o", "big-copy", *there])
    assert "big-copy" in shown
    assert place.run("models", "get", model["model_id"], "-o", "big-copy", "--force").err == ""


def on_a_terminal(folder: Path, arguments: Sequence[str]) -> str:
    """Run the command with a terminal as its standard error; return what stood there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "from coordinator.cli import main; main()", *arguments],
        cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 1 << 16):
            shown += block
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0, shown
    return shown.decode()


def test_where_there_is_no_store_none_is_made(workplace: Workplace) -> None:
    before = sorted(workplace.folder.iterdir())
    for arguments in (["models"], ["store"], ["store", "tenants"], ["models", "put", DDC, "counting.py"]):
        assert "`fedchord store serve`" in workplace.run(*arguments, code=3).err
    assert sorted(workplace.folder.iterdir()) == before


def test_a_service_that_is_not_there_is_told(workplace: Workplace) -> None:
    ended = workplace.run("models", "--url", "http://127.0.0.1:9", code=5)
    assert "http://127.0.0.1:9" in ended.err
    assert len(ended.err.splitlines()) == 1


def test_the_service_says_who_may_call_and_keeps_what_it_has(workplace: Workplace) -> None:
    process = workplace.start("store", "serve", "--port", "0")
    try:
        assert process.stdout is not None
        said = process.stdout.readline() + process.stdout.readline()
        assert "http://127.0.0.1:" in said
        assert "everybody on this machine" in said
        workplace.run("store", "create", DDC)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) in (0, 130)
    finally:
        process.kill()
        process.communicate()
    with serving(workplace) as said_again:
        assert said_again["http_access"] == "open"
        found = workplace.run("store", "list", "--url", said_again["url"], "--json").json
        assert [each["model_store_ddc"] for each in found] == [DDC]
        port = said_again["url"].rpartition(":")[2]
        assert port in workplace.run("store", "serve", "--port", port, code=5).err
    assert "keys" in workplace.run("store", "serve", "--host", "0.0.0.0", "--port", "0", code=2).err


def test_tenants_call_with_key_and_secret_and_see_what_is_theirs(tmp_path: Path) -> None:
    home = make_workplace(tmp_path / "home")
    with serving(home):
        pass
    settings = home.folder / "fedchord-store" / "fedchord.toml"
    settings.write_text(settings.read_text() + 'http_access = "keys"\n')
    clinic = home.run("store", "tenants", "add", "clinic-a", "--json").json
    assert clinic["secret"]
    assert clinic["secret"] not in home.run("store", "tenants", "--json").out
    assert "clinic-a" in home.run("store", "tenants").out
    assert clinic["secret"].encode() not in (home.folder / "fedchord-store" / "fedchord.db").read_bytes()
    home.run("store", "create", "ddc:shared")
    home.run("store", "create", "ddc:hidden")

    away = make_workplace(tmp_path / "away")

    def configure(secret: str) -> None:
        text = f'store_api_key = "{clinic["api_key"]}"\nstore_secret = "{secret}"\n'
        (away.folder / "client.toml").write_text(text)

    with serving(home) as said:

        def call(*arguments: str, code: int = 0) -> Ended:
            return away.run("--config", "client.toml", *arguments, "--url", said["url"], code=code)

        def stores() -> list[str]:
            return [each["model_store_ddc"] for each in call("store", "--json").json]

        assert said["http_access"] == "keys"
        assert "APIKey" in away.run("store", "--url", said["url"], code=4).err
        configure("wrong")
        refused = call("store", code=4).err
        configure(clinic["secret"])
        assert stores() == []
        call("store", "create", "ddc:ours")
        home.run("store", "open", "ddc:shared", "clinic-a")
        assert sorted(stores()) == ["ddc:ours", "ddc:shared"]
        (away.folder / "model").write_bytes(b"a model")
        call("models", "put", "ddc:ours", "model")
        call("models", "put", "ddc:shared", "model", code=4)
        call("models", "put", "ddc:hidden", "model", code=3)
        home.run("store", "open", "ddc:shared", "clinic-a", "--write")
        call("models", "put", "ddc:shared", "model")
        home.run("store", "close", "ddc:shared", clinic["tenant_id"][:8])
        call("models", "put", "ddc:shared", "model", code=3)
        renewed = home.run("store", "tenants", "renew", "clinic-a", "--json").json["secret"]
        wait_for(lambda: fails(call, "store", code=4), seconds=20, what="the old secret is refused")
        configure(renewed)
        assert stores() == ["ddc:ours"]
        home.run("store", "tenants", "disable", "clinic-a")
        wait_for(lambda: fails(call, "store", code=4), seconds=20, what="a disabled tenant is refused")
        assert call("store", code=4).err == refused
        home.run("store", "tenants", "enable", "clinic-a")
        assert stores() == ["ddc:ours"]


def fails(call: Callable[..., Ended], *arguments: str, code: int) -> bool:
    try:
        call(*arguments, code=code)
    except AssertionError:
        return False
    return True


def test_a_store_feeds_its_upstream_and_gets_models_from_it(tmp_path: Path) -> None:
    centre, edge = make_workplace(tmp_path / "centre"), make_workplace(tmp_path / "edge")
    with serving(centre) as said:
        centre.run("store", "create", "ddc:all")
        with serving(edge):
            pass
        settings = edge.folder / "fedchord-store" / "fedchord.toml"
        settings.write_text(f'{settings.read_text()}tenant_id = "clinic-a"\ntenant_name = "Clinic A"\n')
        edge.run("store", "create", DDC)
        (edge.folder / "model_1").write_bytes(b"an update")
        model = edge.run("models", "put", DDC, "model_1", "--kind", "update", "--json").json
        assert "upstream" in edge.run("store", "feedback", DDC, model["model_id"], code=4).err

        add = ["store", "upstreams", "add", DDC, "--to", said["url"], "--store", "ddc:all", "--alias", "centre"]
        upstream = edge.run(*add, "--json").json
        assert upstream["upstream_endpoint"] == said["url"]
        assert "centre" in edge.run("store", "upstreams").out
        received = edge.run("store", "feedback", DDC, model["model_id"][:8], "--json").json
        assert received["model_id"] != model["model_id"]
        assert (received["model_hash"], received["model_state"], received["hop_count"]) == (model["model_hash"], 20, 1)
        again = edge.run("store", "feedback", DDC, model["model_id"], "--upstream", "centre", "--json").json
        assert again["model_id"] == received["model_id"]
        listed = centre.run("models", "lineage", received["model_id"], "--json").json
        assert [(each["model_id"], each["parents"]) for each in listed] == [(received["model_id"], [])]
        assert "copied from node" in centre.run("models", "lineage", received["model_id"]).out

        (centre.folder / "mean").write_bytes(b"an aggregate")
        mean = centre.run("models", "put", "ddc:all", "mean", "--aggregated", "--kind", "global", "--json").json
        info = edge.run("store", "transfer", DDC, "--info", "--json").json
        assert info["model_id"] == mean["model_id"]
        taken = edge.run("store", "transfer", DDC, "--json").json
        assert (taken["model_hash"], taken["model_state"]) == (mean["model_hash"], 40)
        edge.run("models", "get", taken["model_id"], "-o", "mean")
        assert (edge.folder / "mean").read_bytes() == b"an aggregate"

        edge.run("store", "upstreams", "disable", upstream["id"][:8])
        edge.run("store", "transfer", DDC, code=4)
        edge.run("store", "upstreams", "enable", upstream["id"][:8])
        assert edge.run("store", "upstreams", "remove", upstream["id"][:8], "--json").json["removed"] is True
        assert edge.run("store", "upstreams", "--json").json == []

        settings.write_text(f'{settings.read_text()}upstream_url = "{said["url"]}"\n')
        party = edge.run("store", "parties", "add", "my experiment 1", "--json").json
        assert (party["tenant_name"], party["hop_count"]) == ("Clinic A", 1)
        assert [each["id"] for each in centre.run("store", "parties", "--json").json] == [party["id"]]
        assert "my experiment 1" in edge.run("store", "parties").out
        edge.run("store", "parties", "remove", party["id"][:8])
        assert edge.run("store", "parties", "--json").json == []


def test_an_upstreams_secret_comes_from_a_file_and_is_not_shown_again(workplace: Workplace) -> None:
    with serving(workplace):
        pass
    workplace.run("store", "create", DDC)
    (workplace.folder / "secret.txt").write_text("a-long-secret\n")
    add = ["store", "upstreams", "add", DDC, "--to", "https://models.example.org", "--api-key", "a-key"]
    assert "--secret-file" in workplace.run(*add, code=2).err
    said = workplace.run(*add, "--secret-file", "secret.txt", "--json").out
    said += workplace.run("store", "upstreams", "--json").out
    assert "a-key" in said
    assert "a-long-secret" not in said
    records = b"".join(file.read_bytes() for file in (workplace.folder / "fedchord-store").glob("fedchord.db*"))
    assert b"a-long-secret" not in records


def test_a_jobs_models_and_their_lineage(workplace: Workplace) -> None:
    workplace.up()
    job_id = workplace.run("submit", workplace.job_file(rounds=2), "--watch", "--json").json["job_id"]
    workplace.run("down")
    assert "--folder" in workplace.run("store", "serve", code=4).err
    found = workplace.run("models", "list", "--job", job_id[:8], "--kind", "global", "--json").json
    assert [model["round"] for model in found] == [2, 1]
    assert {model["model_store_ddc"] for model in found} == {"ddc:count"}
    assert [each["model_store_ddc"] for each in workplace.run("store", "--json").json] == ["ddc:count"]

    listed = workplace.run("models", "lineage", found[0]["model_id"], "--json").json
    kinds = [(each["model_kind"], each["round"], each["site"]) for each in listed]
    assert sorted(kinds, key=str) == sorted(
        [("global", 2, None), ("update", 2, "site-1"), ("update", 2, "site-2"),
         ("global", 1, None), ("update", 1, "site-1"), ("update", 1, "site-2"), ("initial", 0, "site-1")],
        key=str,
    )  # fmt: skip
    assert {each["job_id"] for each in listed} == {job_id}
    tree = workplace.run("models", "lineage", found[0]["model_id"]).out
    words = (f"job {job_id[:8]}", "round 2", "update of site-1", "round 1", "start", "initial")
    order = [tree.index(word) for word in words]
    assert order == sorted(order)

    workplace.run("models", "get", "--job", job_id[:8], "-o", "count.safetensors")
    back = safetensors.numpy.load_file(workplace.folder / "count.safetensors")
    assert back["count"].tolist() == [2.0, 2.0, 2.0]

    settings = workplace.folder / "fedchord-stack" / "fedchord.toml"
    bounds = "keep_updates_days = 0\nkeep_models_days = 0\nreference_seconds = 1\n"
    settings.write_text(bounds + settings.read_text())
    wait_for(lambda: len(workplace.run("gc", "--dry-run", "--json").json["expired"]) > 5, seconds=20, what="all is due")
    told = workplace.run("gc", "--dry-run", "--older-than-hours", "0", "--json").json
    assert sorted(each["model_kind"] for each in told["expired"]) == ["global", "initial", *["update"] * 4]
    assert "Would let expire 4 of kind update" in workplace.run("gc", "--dry-run").out
    done = workplace.run("gc", "--older-than-hours", "0", "--json").json
    assert (done["bytes"] > 0, {**done, "dry_run": True}) == (True, told)
    assert workplace.run("gc", "--older-than-hours", "0").out == "Removed 0 blobs, 0 B.\n"
    assert "aggregated, expired" in workplace.run("models").out
    assert "keep_models_days is 0" in workplace.run("models", "show", found[1]["model_id"]).out
    assert "and its bytes were removed" in workplace.run("models", "get", found[1]["model_id"], code=3).err
    assert "cannot be verified any more" in workplace.run("verify", found[1]["model_id"], code=3).out
    kept = workplace.run("models", "keep", found[0]["model_id"][:8], "--json").json
    assert (kept["kept"], kept["models"]) == (True, 7)
    assert "--off" in workplace.run("models", "delete", found[0]["model_id"], code=4).err
    assert "no more" in workplace.run("models", "keep", found[0]["model_id"], "--off").out
