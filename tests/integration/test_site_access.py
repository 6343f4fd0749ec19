"""The access rights that the docs give a site's broker user are enough for all that a site does by itself."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from redis import Redis
from redis.exceptions import NoPermissionError

from common.heartbeats import read_heartbeats, remove_heartbeat, write_heartbeat
from common.progress import read_progress
from common.queues import cancel_key, heartbeat_key, progress_key
from common.settings import Settings
from tests.federation import heartbeat
from tests.servers import ValkeyServer, valkey
from worker.reports import Reports

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "set-up-a-site.md"
SITE = "clinic-a"


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    with valkey() as running:
        yield running


@pytest.fixture
def operator(server: ValkeyServer) -> Iterator[Redis]:
    found = re.search(rf"^ACL SETUSER {SITE} .*?(?=^```)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    with Redis.from_url(server.url) as client:
        client.execute_command(*found.group(0).split())
        yield client


@pytest.fixture
def url(server: ValkeyServer, operator: Redis) -> str:
    return f"redis://{SITE}:A-LONG-PASSWORD@127.0.0.1:{server.port}/0"


def test_a_site_may_tell_how_far_it_is_and_hear_that_it_shall_stop(operator: Redis, url: str) -> None:
    reports = Reports(Settings(broker_url=SecretStr(url), site_name=SITE))
    reports.tell("job.train.1.clinic-a", 0.5, "epoch 1")
    assert list(read_progress(operator, [(SITE, "job.train.1.clinic-a")])) == ["job.train.1.clinic-a"]
    operator.set(cancel_key(SITE, "job.train.1.clinic-a"), 1)
    assert reports.why_stop("job", "job.train.1.clinic-a") == "The part is not wanted any more."
    reports.forget("job.train.1.clinic-a")
    assert read_progress(operator, [(SITE, "job.train.1.clinic-a")]) == {}


def test_a_site_may_say_that_it_is_alive_and_nothing_of_another_site(operator: Redis, url: str) -> None:
    with Redis.from_url(url) as client:
        write_heartbeat(client, SITE, heartbeat(()), lifetime_seconds=60)
        assert list(read_heartbeats(operator, [SITE])) == [SITE]
        remove_heartbeat(client, SITE, "test")
        assert read_heartbeats(operator, [SITE]) == {}
        for key in (heartbeat_key("clinic-ab"), progress_key("clinic-a-b", "task")):
            with pytest.raises(NoPermissionError):
                client.set(key, b"")
