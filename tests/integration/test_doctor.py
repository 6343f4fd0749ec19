"""`fedchord doctor` against real services, well and unwell, and `fedchord why` at its edge."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from common.dead_letters import set_aside
from common.heartbeats import write_heartbeat
from common.settings import Settings
from coordinator.checks.broker import check_queues, judge_memory, judge_persistence
from coordinator.checks.clocks import Skew, check_clocks, judge_clocks
from coordinator.checks.database import check_database
from coordinator.checks.embedded import check_stack
from coordinator.checks.finding import Finding, Outcome
from coordinator.checks.limit import run_checks, within
from coordinator.checks.machine import judge_disk
from coordinator.checks.object_store import check_object_store
from coordinator.doctor import examine, is_well
from coordinator.listeners import coordinator_workers
from coordinator.stack.folder import Stack, StackFolder
from coordinator.submitting import submit
from store.database import writing
from store.folder import FolderStore
from store.parties import set_enabled
from tests.contract.postgres import PostgresServer
from tests.federation import ROOT, Federation, clean_environment, federation, heartbeat, wait_until
from tests.servers import free_ports, juicefs

OK, WARNING, FAULT = Outcome.OK, Outcome.WARNING, Outcome.FAULT


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Two sites and a coordinator process; the site's heartbeats are written by the tests."""
    folder = tmp_path_factory.mktemp("doctor")
    with federation(folder, "alpha", "beta", heartbeat_seconds=0.2) as made, made.coordinator():
        wait_until(lambda: coordinator_workers(made.sites["alpha"].app), what="the coordinator worker")
        yield made


@pytest.fixture
def well(running: Federation) -> Federation:
    """Give the federation with all as it should be."""
    running.services.broker.flushdb()
    running.services.broker.config_set("maxmemory-policy", "noeviction")
    for site in ("alpha", "beta"):
        beat(running, site)
        with writing(running.services.engine) as connection:
            set_enabled(connection, site, True)
    return running


def beat(made: Federation, site: str, *, ahead_seconds: float = 0.0, **changes: Any) -> None:
    known = {"version": "0.1.0", "disk_free": 10**11, "at": time.time() + ahead_seconds, **changes}
    sent = heartbeat(("constant",)).model_copy(update=known)
    write_heartbeat(made.services.broker, site, sent, lifetime_seconds=60)


def by_check(findings: tuple[Finding, ...]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def fedchord(made: Federation, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line with the federation's settings."""
    return subprocess.run(
        [sys.executable, "-c", "from coordinator.cli import main; main()", "--config", str(made.config), *arguments],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_federation_that_is_well_has_no_fault(well: Federation) -> None:
    findings = examine(well.services.settings, None)
    outcomes = {finding.check: finding.outcome for finding in findings}
    assert is_well(findings), findings
    assert outcomes == {
        "versions": OK,
        "signing key": OK,
        "disk: blobs, database": OK,
        "database": OK,
        "database: revision": OK,
        "database: writing": OK,
        "object store": OK,
        "broker": OK,
        "broker: memory": OK,
        "broker: persistence": WARNING,  # the tests' broker keeps nothing
        "coordinator worker": OK,
        "site queues": OK,
        "dead letters": OK,
        "clocks": OK,
        "sites": OK,
        "site alpha": OK,
        "site beta": OK,
    }


def test_it_leaves_nothing_in_the_object_store(well: Federation) -> None:
    blobs = well.services.blobs
    before = sorted(blob.digest for blob in blobs.blobs())
    assert is_well(examine(well.services.settings, None))
    assert sorted(blob.digest for blob in blobs.blobs()) == before
    assert isinstance(blobs, FolderStore)
    assert list((blobs.folder / "bodies").iterdir()) == []


def test_the_command_ends_with_5_if_there_is_a_fault_and_says_what_to_mend(well: Federation) -> None:
    assert fedchord(well, "doctor").returncode == 0
    key_file = well.services.settings.signing_key_file
    key_file.chmod(0o644)
    try:
        ended = fedchord(well, "doctor", "--json")
    finally:
        key_file.chmod(0o600)
    assert ended.returncode == 5, ended.stderr
    told = json.loads(ended.stdout)
    assert told["well"] is False
    (fault,) = [each for each in told["findings"] if each["outcome"] == "fault"]
    assert fault["check"] == "signing key"
    assert f"chmod 600 {key_file}" in fault["mend"]


def test_what_was_set_aside_from_a_queue_is_a_warning_with_the_newest_reason(well: Federation) -> None:
    set_aside(well.services.broker, "coordinator", b"x", "it is not JSON")
    set_aside(well.services.broker, "site.alpha", b"y", "its body is not base64")
    found = [each for each in check_queues(well.services.settings) if each.check == "dead letters"]
    assert [each.outcome for each in found] == [WARNING, WARNING]
    assert "Set aside on coordinator.dead: 1; the newest: it is not JSON" in found[0].sentence
    assert "site.alpha.dead" in found[1].sentence


def test_a_broker_that_may_evict_is_a_fault(well: Federation) -> None:
    broker = well.services.broker
    broker.config_set("maxmemory-policy", "allkeys-lru")
    broker.config_set("maxmemory", 10**9)
    try:
        found = by_check(examine(well.services.settings, None))["broker: memory"]
    finally:
        broker.config_set("maxmemory", 0)
    assert found.outcome is FAULT
    assert "allkeys-lru" in found.sentence
    assert "noeviction" in found.mend


@pytest.mark.parametrize(
    ("policy", "most", "used", "outcome"),
    [("noeviction", 0, 5, OK), ("noeviction", 100, 50, OK), ("noeviction", 100, 95, WARNING),
     ("volatile-lru", 0, 5, WARNING), ("volatile-lru", 100, 5, FAULT)],
)  # fmt: skip
def test_memory_is_judged_by_policy_and_use(policy: str, most: int, used: int, outcome: Outcome) -> None:
    info = {"maxmemory_policy": policy, "maxmemory": most, "used_memory": used}
    assert judge_memory(info).outcome is outcome


@pytest.mark.parametrize(
    ("info", "saves", "outcome"),
    [({"aof_enabled": 1}, "", OK), ({}, "3600 1", OK), ({}, None, OK), ({}, "", WARNING),
     ({"aof_enabled": 1, "aof_last_write_status": "err"}, "", FAULT),
     ({"rdb_last_bgsave_status": "err"}, "1 1", FAULT)],
)  # fmt: skip
def test_persistence_is_judged_by_what_the_broker_keeps(
    info: dict[str, Any], saves: str | None, outcome: Outcome
) -> None:
    assert judge_persistence(info, saves=saves).outcome is outcome


def test_a_site_that_is_away_or_disabled_or_of_another_version_is_told(well: Federation) -> None:
    well.services.broker.delete("site.alpha.heartbeat")
    beat(well, "beta", version="9.1.0")
    found = by_check(examine(well.services.settings, None))
    assert found["site alpha"].outcome is WARNING
    assert "disable alpha" in found["site alpha"].mend
    assert found["site beta"].outcome is FAULT
    assert "install the same" in found["site beta"].mend

    with writing(well.services.engine) as connection:
        set_enabled(connection, "alpha", False, "holiday")
    beat(well, "beta", version="0.1.1", trainers=())
    found = by_check(examine(well.services.settings, None))
    assert (found["site alpha"].outcome, found["site alpha"].sentence) == (
        OK,
        "No heartbeat. It is disabled (holiday).",
    )
    assert "offers no trainer" in found["site beta"].mend


@pytest.mark.parametrize("ahead_seconds", [60.0, -60.0])
def test_a_clock_that_is_wrong_by_more_than_five_seconds_is_a_fault(well: Federation, ahead_seconds: float) -> None:
    done = threading.Event()

    def pulse() -> None:
        while not done.wait(0.05):
            beat(well, "beta", ahead_seconds=ahead_seconds)

    thread = threading.Thread(target=pulse)
    thread.start()
    try:
        found = [each for each in check_clocks(well.services.settings) if each.outcome is FAULT]
    finally:
        done.set()
        thread.join()
    assert len(found) == 1
    assert "The clock of site beta is" in found[0].sentence
    assert ("ahead of" if ahead_seconds > 0 else "behind") in found[0].sentence


def test_if_every_other_clock_differs_alike_this_machines_is_wrong() -> None:
    wrong = Skew(low=59.9, high=60.1)
    all_wrong = judge_clocks({"the broker": wrong, "site a": wrong})
    assert {finding.mend for finding in all_wrong} == {
        "Every other clock differs in the same way: set this machine's by NTP."
    }
    one_wrong = judge_clocks({"the broker": wrong, "site a": Skew(low=-0.1, high=0.1)})
    assert [finding.mend for finding in one_wrong] == ["Set it by NTP."]


@pytest.mark.parametrize(("free", "outcome"), [(10**8, FAULT), (10**9, WARNING), (10**10, OK)])
def test_a_disk_is_judged_by_the_room_on_it(tmp_path: Path, free: int, outcome: Outcome) -> None:
    assert judge_disk("disk", tmp_path, free=free, total=10**12).outcome is outcome


def test_services_that_are_not_there_are_faults_and_nothing_is_made(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    settings = Settings(
        broker_url=SecretStr(f"redis://127.0.0.1:{port}/0"),
        database_url=SecretStr(f"sqlite:///{tmp_path / 'no.db'}"),
        blob_folder=tmp_path / "blobs",
        signing_key_file=tmp_path / "signing.key",
    )
    found = by_check(examine(settings, None))
    faults = {name for name, finding in found.items() if finding.outcome is FAULT}
    assert faults == {"signing key", "database", "object store", "broker"}
    assert list(tmp_path.iterdir()) == []


def test_a_service_that_never_answers_stops_no_other_check(well: Federation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"redis://127.0.0.1:{mute.getsockname()[1]}/0"
        settings = well.services.settings.model_copy(update={"broker_url": SecretStr(url)})
        begun = time.monotonic()
        found = by_check(examine(settings, None, limit_seconds=2))
        assert time.monotonic() - begun < 10
    assert "has not ended in 2 s" in found["broker"].sentence
    assert found["broker"].outcome is FAULT
    assert found["database: writing"].outcome is OK
    assert found["object store"].outcome is OK


def test_what_a_check_found_before_it_failed_counts() -> None:
    good = Finding(check="a", outcome=OK, sentence="Good.")

    def breaks() -> Iterator[Finding]:
        yield good
        raise ValueError("no")

    found = run_checks({"a": breaks, "b": lambda: [good]}, limit_seconds=10)
    assert [finding.outcome for finding in found] == [OK, FAULT, OK]
    assert found[1].sentence == "The check failed: ValueError: no."


def test_what_takes_too_long_is_told_as_trouble() -> None:
    assert within(10, lambda: None, what="It") == ""
    assert "has not ended in 0.1 s" in within(0.1, lambda: time.sleep(1), what="It")


def test_postgresql_is_looked_at_with_its_clock_and_size(well: Federation) -> None:
    with PostgresServer() as server:
        url = SecretStr(server.new_database())
        settings = well.services.settings.model_copy(update={"database_url": url})
        empty = {finding.check: finding.outcome for finding in check_database(settings)}
        assert empty == {"database": OK, "database: revision": FAULT}
        clocks = list(check_clocks(settings))
        assert any("the database" in finding.sentence for finding in clocks if finding.outcome is OK), clocks


def test_an_s3_store_is_looked_at_by_references_and_tells_the_time(well: Federation, tmp_path: Path) -> None:
    with juicefs() as server:
        s3: dict[str, Any] = {
            "blob_store": "s3",
            "s3_endpoint": server.endpoint,
            "s3_access_key": server.access_key,
            "s3_secret_key": SecretStr(server.secret_key),
            "s3_secure": False,
            "s3_bucket": "doctor",
            "cache_folder": tmp_path / "cache",
        }
        settings = well.services.settings.model_copy(update=s3)
        assert [finding.outcome for finding in check_object_store(settings)] == [FAULT]
        for name in ("blobs", "scratch"):
            (tmp_path / "cache" / name).mkdir(parents=True)
        (found,) = run_checks({"object store": partial(check_object_store, settings)}, limit_seconds=30)
        assert "NoSuchBucket" in found.sentence
        server.client().make_bucket("doctor")
        (found,) = check_object_store(settings)
        assert found.outcome is OK, found
        assert [each.object_name for each in server.client().list_objects("doctor", prefix="blobs/")] == []
        clocks = list(check_clocks(settings))
    assert any("the object store" in finding.sentence for finding in clocks if finding.outcome is OK), clocks


# --- `fedchord why`, from the records and the broker to the words ----------------------------------------------------


def test_why_names_the_sites_that_owe_an_answer_and_what_they_are_at(well: Federation) -> None:
    job = submit(well.services, well.spec(sites=("alpha", "beta"), min_sites=2))
    wait_until(lambda: well.services.broker.llen("site.alpha") and well.services.broker.llen("site.beta"))
    well.services.broker.delete("site.alpha.heartbeat")
    beat(well, "beta", tasks=(f"{job.job_id}.start.0.beta",), working_on=("test: the start at beta",))
    told = json.loads(fedchord(well, "why", job.job_id[:8], "--json").stdout)
    assert told["summary"] == "Job test: the start waits for the answers of 2 of 2 sites: alpha, beta."
    assert told["until"] is not None
    alpha, beta = told["details"][:2]
    assert "alpha has no heartbeat: its message waits on its queue since" in alpha
    assert "beta is alive and works on this very part" in beta
    assert any("worker of alpha" in action for action in told["actions"])
    assert fedchord(well, "abort", job.job_id).returncode == 0
    ended = fedchord(well, "why", job.job_id[:8])
    assert "Job test was aborted: by the operator." in ended.stdout, ended
    assert fedchord(well, "why", "no-such-job").returncode == 3


def test_why_answers_without_broker_and_without_coordinator(tmp_path: Path) -> None:
    with federation(tmp_path, "alpha") as made:
        job = submit(made.services, made.spec(sites=("alpha",)))
        told = json.loads(fedchord(made, "why", job.job_id, "--json").stdout)
        assert (told["state"], told["details"]) == (
            "submitted",
            ["No coordinator worker answers (messages on its queue: 1)."],
        )
        config = made.config.read_text().splitlines()
        (port,) = free_ports(1)
        away = [f'broker_url = "redis://127.0.0.1:{port}/0"' if "broker_url" in line else line for line in config]
        made.config.write_text("\n".join(away))
        told = json.loads(fedchord(made, "why", job.job_id, "--json").stdout)
        assert "does not answer" in told["details"][0]
        assert told["actions"][0].startswith("Start the broker")


def test_the_database_that_a_newer_fedchord_wrote_is_a_fault(tmp_path: Path) -> None:
    with federation(tmp_path, "alpha") as made:
        with writing(made.services.engine) as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = 'ffff'"))
        found = by_check(tuple(check_database(made.services.settings)))
    assert found["database: revision"].outcome is FAULT
    assert found["database: revision"].mend == "Upgrade this installation."
    assert replace(found["database"], sentence="").outcome is OK


def test_a_heartbeat_that_is_not_renewed_while_we_look_accuses_no_clock(well: Federation) -> None:
    beat(well, "beta", ahead_seconds=-60)  # a site whose period is a minute
    assert [each.outcome for each in check_clocks(well.services.settings)] == [OK]


def test_a_stack_that_does_not_run_is_a_fault(tmp_path: Path) -> None:
    stack = Stack(sites=(), working_folder=tmp_path, broker_port=1, supervisor_socket=tmp_path / "socket")
    StackFolder(tmp_path).save(stack)
    (found,) = check_stack(tmp_path)
    assert (found.outcome, found.mend) == (FAULT, "`fedchord up` starts it.")
