import json
import os
import signal
import socket
import stat
import tomllib
from pathlib import Path

import numpy as np
import psutil
import pytest
import urllib3

from store.client import Api
from store.tensors import read_tensors
from tests.servers import free_ports
from tests.workplace import Workplace, wait_for


def pid_of(place: Workplace, name: str) -> int:
    """Return the process id of one of the stack's processes."""
    return next(int(each["pid"]) for each in place.run("status", "--json").json["processes"] if each["name"] == name)


def test_status_lists_every_process_of_a_stack_that_runs(running: Workplace) -> None:
    status = running.run("status", "--json").json
    assert {each["name"]: each["state"] for each in status["processes"]} == {
        "coordinator": "RUNNING",
        "coordinator-2": "RUNNING",
        "flower": "RUNNING",
        "http": "RUNNING",
        "site-1": "RUNNING",
        "site-2": "RUNNING",
        "valkey": "RUNNING",
    }
    assert (status["running"], status["well"], status["sites_missing"], status["leftovers"]) == (True, True, [], 0)


def test_the_files_with_secrets_are_their_owners_alone(running: Workplace) -> None:
    names = ["stack.json", "fedchord.toml", "supervisord.conf", "signing.key", "valkey/valkey.conf"]
    names += [f"sites/site-1/{name}" for name in ("site.toml", "signing.key")]
    modes = {name: stat.S_IMODE((running.stack / name).stat().st_mode) for name in names}
    assert modes == dict.fromkeys(names, 0o600)


def test_the_brokers_password_is_in_no_command_line(running: Workplace) -> None:
    config = (running.stack / "valkey" / "valkey.conf").read_text()
    password = next(line.split()[1] for line in config.splitlines() if line.startswith("requirepass"))
    assert [process for process in running.processes() if password in " ".join(process.cmdline())] == []


def test_flower_shows_every_worker_and_task_by_name_to_whoever_has_the_password(running: Workplace) -> None:
    url = running.run("status", "--json").json["flower"]
    password = json.loads((running.stack / "stack.json").read_text())["flower_password"]
    headers = urllib3.make_headers(basic_auth=f"fedchord:{password}")

    def names() -> tuple[set[str], set[str]]:
        workers = urllib3.request("GET", f"{url}/api/workers?refresh=1", headers=headers).json()
        tasks = urllib3.request("GET", f"{url}/api/tasks", headers=headers).json()
        return {name.partition("@")[0] for name in workers}, {task["name"] for task in tasks.values()}

    assert urllib3.request("GET", f"{url}/api/workers").status == 401
    running.run("submit", running.job_file(rounds=1), "--watch", "--json")
    workers = {"coordinator", "coordinator-2", "site-1", "site-2"}
    tasks = {"site.update_round_start", "coordinator.update_ready", "coordinator.aggregate"}
    wait_for(lambda: names()[0] >= workers and names()[1] >= tasks, seconds=30, what="Flower shows them")


def test_the_http_service_serves_the_models_and_the_jobs_of_the_stack(running: Workplace) -> None:
    url = running.run("status", "--json").json["http"]
    with Api(url) as api:
        spec = {"name": "by http", "trainer": "counting", "rounds": 2, "min_sites": 2}
        job = api.call("job.submit", spec=spec, key="the-only-one")
        assert api.call("job.submit", spec=spec, key="the-only-one")["job_id"] == job["job_id"]
        ended = api.call("job.get", job_id=job["job_id"], wait_seconds=30)
        assert (ended["state"], ended["model_id"]) == (
            "completed",
            api.get_latest_aggregated_model("ddc:by http")["model_id"],
        )
        count = b"".join(api.load_model("ddc:by http", ended["model_id"]))
    (running.folder / "by-http.safetensors").write_bytes(count)
    assert read_tensors(running.folder / "by-http.safetensors")["count"].tolist() == [2.0, 2.0, 2.0]
    assert running.run("jobs", job["job_id"], "--json").json["state"] == "completed"


def test_the_http_service_listens_on_loopback_only(running: Workplace) -> None:
    service = psutil.Process(pid_of(running, "http"))
    listening = [each.laddr.ip for each in service.net_connections() if each.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"]


def test_a_second_up_is_refused_and_disturbs_nothing(running: Workplace) -> None:
    before = pid_of(running, "coordinator")
    ended = running.run("up", code=4)
    assert "is running already" in ended.err
    assert pid_of(running, "coordinator") == before


def test_a_job_that_is_watched_to_its_end_leaves_a_model(running: Workplace) -> None:
    ended = running.run("submit", running.job_file(rounds=3), "--watch", "--json").json
    job_id = ended["job_id"]
    assert (ended["state"], ended["rounds_done"]) == ("completed", 3)
    assert running.run("jobs", job_id[:8], "--json").json == ended
    assert job_id in [job["job_id"] for job in running.run("jobs", "--json").json]

    models = running.run("models", "list", "--job", job_id, "--kind", "global", "--json").json
    assert [model["round"] for model in models] == [3, 2, 1]
    shown = running.run("models", "show", models[0]["model_id"][:13], "--json").json
    assert shown["tensors"] == {"count": {"dtype": "F32", "shape": [3]}}

    running.run("models", "get", "--job", job_id, "--output", "count.safetensors")
    tensors = read_tensors(running.folder / "count.safetensors")
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"count": [3.0, 3.0, 3.0]}
    refused = running.run("models", "get", "--job", job_id, "--output", "count.safetensors", code=2)
    assert "is there already" in refused.err
    files = running.run("models", "get", models[0]["model_id"], "--shards", "--output", "count", "--json").json["files"]
    assert sorted(Path(file).name for file in files) == [
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]
    assert np.array_equal(read_tensors(running.folder / files[0])["count"], tensors["count"])


def test_a_watched_job_tells_of_every_round_in_a_line_where_there_is_no_terminal(running: Workplace) -> None:
    lines = running.run("submit", running.job_file(rounds=2), "--watch").out.splitlines()
    begins = [" ".join(line.split(",")[0].split()) for line in lines[:-1]]
    assert begins == [
        "start closed",
        "train round 1 closed",
        "test round 1 closed",
        "train round 2 closed",
        "test round 2 closed",
    ]
    assert lines[-1].startswith("Job count completed.")


def test_an_aborted_job_ends_the_watching_with_its_own_exit_code(running: Workplace) -> None:
    job_id = running.run("submit", running.job_file(rounds=100_000), "--json").json["job_id"]
    watching = running.start("watch", job_id, "--json")
    aborted = running.run("abort", job_id, "--reason", "enough of it", "--json").json
    out, err = watching.communicate(timeout=60)
    assert (aborted["state"], aborted["reason"]) == ("aborted", "enough of it")
    assert (watching.returncode, err.splitlines()[-1]) == (
        6,
        f"fedchord: Job count ({job_id}) was aborted: enough of it",
    )
    assert '"state": "aborted"' in out
    again = running.run("abort", job_id, code=4)
    assert "has ended" in again.err


def test_interrupted_watching_leaves_the_job_running_and_says_how_to_come_back(running: Workplace) -> None:
    job_id = running.run("submit", running.job_file(rounds=100_000), "--json").json["job_id"]
    watching = running.start("watch", job_id)
    assert watching.stdout is not None
    assert watching.stdout.readline().startswith("start closed")
    watching.send_signal(signal.SIGINT)
    _, err = watching.communicate(timeout=60)
    assert watching.returncode == 130
    assert f"fedchord watch {job_id[:8]}" in err
    assert running.run("jobs", job_id, "--json").json["state"] == "running"
    running.run("abort", job_id)


def test_a_site_can_be_enrolled_disabled_enabled_and_removed(running: Workplace) -> None:
    added = running.run("sites", "add", "clinic-a", "--json").json
    kit = running.folder / "clinic-a"
    assert added["start"] == "FEDCHORD_CONFIG=clinic-a/site.toml celery -A worker worker"
    assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in kit.iterdir()} == {
        "site.toml": 0o600,
        "signing.key": 0o600,
    }
    key = (kit / "signing.key").read_bytes()
    running.run("sites", "add", "clinic-a", code=4)
    assert (kit / "signing.key").read_bytes() == key

    def site() -> tuple[bool, str, bool]:
        found = next(each for each in running.run("sites", "--json").json if each["site"] == "clinic-a")
        return found["enabled"], found["reason"], found["alive"]

    assert site() == (True, "", False)
    running.run("sites", "disable", "clinic-a", "--reason", "moving")
    assert site() == (False, "moving", False)
    running.run("sites", "enable", "clinic-a")
    assert site() == (True, "", False)
    running.run("sites", "remove", "clinic-a")
    assert "clinic-a" not in [each["site"] for each in running.run("sites", "--json").json]
    running.run("sites", "remove", "clinic-a", code=3)


def test_a_site_with_a_key_of_its_own_gets_no_private_key(running: Workplace) -> None:
    public_key = running.run("keys", "new", "own.key").out.strip()
    assert running.run("keys", "show", "own.key", "--json").json == {"file": "own.key", "public_key": public_key}
    assert stat.S_IMODE((running.folder / "own.key").stat().st_mode) == 0o600
    kit = running.folder / "clinic-b"
    running.run("sites", "add", "clinic-b", "--public-key", public_key)
    assert [file.name for file in kit.iterdir()] == ["site.toml"]
    (kit / "site.toml").unlink()  # a lost kit is written anew for the same key, and for no other
    other = running.run("keys", "new", "other.key").out.strip()
    assert "enrolled already" in running.run("sites", "add", "clinic-b", "--public-key", other, code=4).err
    assert "enrolled already" in running.run("sites", "add", "clinic-b", code=4).err
    assert list(kit.iterdir()) == []
    running.run("sites", "add", "clinic-b", "--public-key", public_key)
    assert [file.name for file in kit.iterdir()] == ["site.toml"]
    running.run("sites", "remove", "clinic-b")


def test_a_new_key_is_never_written_over_another_file(running: Workplace) -> None:
    (running.folder / "precious").write_text("precious")
    assert "is there already" in running.run("keys", "new", "precious", code=4).err
    assert (running.folder / "precious").read_text() == "precious"
    assert list(running.folder.glob(".precious*")) == []


def test_a_kit_has_the_broker_url_that_was_made_for_its_site(running: Workplace) -> None:
    url = "rediss://clinic-d:a-password@broker.example.org:6379/0?ssl_cert_reqs=required"
    running.run("sites", "add", "clinic-d", "--broker-url", url)
    kit = (running.folder / "clinic-d" / "site.toml").read_text()
    assert tomllib.loads(kit)["broker_url"] == url
    password = json.loads((running.stack / "stack.json").read_text())["broker_password"]
    assert password not in kit
    running.run("sites", "remove", "clinic-d")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["jobs", "no-such-job"], 3, "no job"),
        (["watch", "no-such-job"], 3, "no job"),
        (["models", "show", "no-such-model"], 3, "no model"),
        (["submit", "no-such-file.toml"], 2, "no-such-file.toml"),
        (["sites", "add", "Not A Name"], 2, "not valid"),
        (["sites", "add", "clinic-c", "--public-key", "AAAA"], 2, "copy it again"),
        (["sites", "add", "clinic-c", "--broker-url", "broker.example.org"], 2, "redis://"),
        (["keys", "show", "no-such.key"], 2, "no-such.key"),
        (["keys", "new", "counting.py"], 4, "is there already"),
        (["models", "get"], 2, "--job"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(running: Workplace, arguments: list[str], code: int, words: str) -> None:
    ended = running.run(*arguments, code=code)
    assert ended.out == ""
    assert len(ended.err.splitlines()) == 1
    assert ended.err.startswith("fedchord: ")
    assert words in ended.err


def test_a_port_in_use_is_told_before_anything_is_written(workplace: Workplace) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = workplace.run("up", "--port", str(port), code=5)
    assert f"Port {port} is in use" in ended.err
    assert not workplace.stack.exists()
    assert workplace.processes() == []


@pytest.mark.parametrize("name", ["coordinator", "coordinator-3", "http", "supervisord"])
def test_a_site_called_like_another_process_is_told_before_anything_is_written(workplace: Workplace, name: str) -> None:
    (workplace.folder / "data" / name).mkdir(parents=True)
    ended = workplace.run("up", "--site-data", "data", code=2)
    assert f"another process of the stack is called {name}; rename that folder" in ended.err
    assert not workplace.stack.exists()


def test_a_stack_has_as_many_coordinator_workers_as_are_wished_for(workplace: Workplace) -> None:
    workplace.up("--coordinators", "3")
    names = {f"coordinator{number}" for number in ("", "-2", "-3")}
    found = workplace.run("status", "--json").json["processes"]
    assert {each["name"] for each in found if each["name"].startswith("coordinator")} == names
    workplace.run("down")
    workplace.up("--coordinators", "1")
    workplace.run("down")
    workplace.up()  # as it was
    found = workplace.run("status", "--json").json["processes"]
    assert [each["name"] for each in found if each["name"].startswith("coordinator")] == ["coordinator"]


@pytest.mark.parametrize("largest_file", [0, 100, 2000, 20_000])
def test_a_stack_that_the_disk_cannot_hold_leaves_nothing(workplace: Workplace, largest_file: int) -> None:
    ended = workplace.run("up", code=5, largest_file=largest_file)
    assert len(ended.err.splitlines()) == 1
    assert "disk" in ended.err
    assert not workplace.stack.exists()
    assert workplace.processes() == []


def test_on_a_full_disk_a_job_is_not_taken_and_a_model_not_half_written(running: Workplace) -> None:
    job_id = running.run("submit", running.job_file(rounds=1), "--watch", "--json").json["job_id"]
    before = sorted(running.folder.iterdir())
    jobs = running.run("jobs", "--json").json
    for arguments in (
        ["submit", "job.toml"],
        ["models", "get", "--job", job_id, "--output", "full.safetensors"],
        ["models", "get", "--job", job_id, "--output", "full", "--shards"],
        ["keys", "new", "full.key"],
        ["sites", "add", "clinic-e"],
    ):
        ended = running.run(*arguments, code=5, largest_file=0)
        assert len(ended.err.splitlines()) == 1
        assert "is full" in ended.err
    assert sorted(running.folder.iterdir()) == before
    assert running.run("jobs", "--json").json == jobs
    assert "clinic-e" not in [each["site"] for each in running.run("sites", "--json").json]


def test_a_trainer_that_cannot_be_found_is_told_and_everything_is_stopped_again(workplace: Workplace) -> None:
    ended = workplace.run("up", "--trainer", "counting=no_such_module:Counting", code=5)
    assert "names a module that is not there" in ended.err
    assert workplace.processes() == []


def test_without_a_stack_every_command_says_what_to_do(workplace: Workplace) -> None:
    assert "`fedchord up` makes one" in workplace.run("status", code=3).err
    assert "`fedchord up` makes one" in workplace.run("down", code=3).err
    assert "make a stack with `fedchord up`" in workplace.run("jobs", code=3).err


def test_down_ends_what_a_killed_supervisor_has_left(workplace: Workplace) -> None:
    workplace.up()
    os.kill(int((workplace.stack / "supervisord.pid").read_text()), signal.SIGKILL)
    status = workplace.run("status", "--json", code=5).json
    assert (status["running"], status["leftovers"] >= 4) == (False, True)
    assert workplace.run("down", "--json").json["stopped"] == status["leftovers"]
    assert workplace.processes() == []


def test_a_job_goes_on_after_down_and_up(workplace: Workplace) -> None:
    def rounds_done() -> int:
        return int(workplace.run("jobs", job_id, "--json").json["rounds_done"])

    url = workplace.up()["http"]
    job_id = workplace.run("submit", workplace.job_file(rounds=100_000), "--json").json["job_id"]
    wait_for(lambda: rounds_done() >= 1, seconds=60, what="a round is done")
    workplace.run("down")
    assert workplace.processes() == []
    for arguments in (["watch", job_id], ["submit", "job.toml"], ["abort", job_id]):
        assert "The broker at" in workplace.run(*arguments, code=5).err

    with socket.socket() as taken:  # others have written the service's address down: it is not changed in silence
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", int(url.rpartition(":")[2])))
        taken.listen()
        assert "choose another one with --http-port" in workplace.run("up", code=5).err
    assert f"HTTP     {url} (models and jobs, open to everybody on this machine)" in workplace.run("up").out
    before = rounds_done()
    wait_for(lambda: rounds_done() > before + 1, seconds=60, what="the job goes on")
    workplace.run("down")


def test_what_only_reads_records_and_blobs_works_while_the_stack_is_down(workplace: Workplace) -> None:
    workplace.up()
    ended = workplace.run("submit", workplace.job_file(rounds=1), "--watch", "--json").json
    job_id, model_id = ended["job_id"], ended["model_id"]
    workplace.run("down")
    assert workplace.run("jobs", job_id, "--json").json == ended
    assert workplace.run("models", "show", model_id[:13], "--json").json["model_id"] == model_id
    workplace.run("models", "get", model_id[:13], "--output", "count.safetensors")
    assert read_tensors(workplace.folder / "count.safetensors")["count"].tolist() == [1.0, 1.0, 1.0]
    workplace.run("sites", "disable", "site-2", "--reason", "moving")
    listed = workplace.run("sites", "--json")
    assert [(each["site"], each["enabled"], each["alive"]) for each in listed.json] == [
        ("site-1", True, None),
        ("site-2", False, None),
    ]
    assert "Who is alive is not known" in listed.err
    assert [line.split()[:3] for line in workplace.run("sites").out.splitlines()[1:]] == [
        ["site-1", "yes", "unknown"],
        ["site-2", "no:", "moving"],
    ]


def test_a_process_that_is_killed_is_started_again(workplace: Workplace) -> None:
    (port,) = free_ports(1)
    assert workplace.up("--http-port", str(port))["http"] == f"http://127.0.0.1:{port}"
    processes = [psutil.Process(pid_of(workplace, name)) for name in ("coordinator", "coordinator-2", "http")]
    for killed in processes:
        killed.kill()
    wait_for(lambda: not any(each.is_running() for each in processes), seconds=10, what="they are gone")
    ended = workplace.run("submit", workplace.job_file(rounds=2), "--watch", "--json").json
    assert ended["state"] == "completed"
    wait_for(lambda: _answers(port), seconds=30, what="the HTTP service is back")
    workplace.run("down")
    assert not _answers(port)


def _answers(port: int) -> bool:
    try:
        return urllib3.request("GET", f"http://127.0.0.1:{port}/health", retries=False).status == 200
    except urllib3.exceptions.HTTPError:
        return False
