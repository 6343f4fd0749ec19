import socket
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from redis.exceptions import RedisError
from sqlalchemy import event, update

from common.errors import BrokerUnavailable
from common.settings import Settings
from coordinator.jobfile import JobSpec
from coordinator.jobs import Job, JobState, add_job, end_job, new_job
from coordinator.progress import job_progress
from coordinator.rounds import Round, add_round
from coordinator.services import Services, make_key, open_services
from coordinator.states import RoundKind, RoundState
from store.database import writing
from store.tables import rounds, utc_now

START = utc_now()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Give settings of a coordinator whose broker is not there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "fedchord.toml"
    config.write_text(f'broker_url = "redis://127.0.0.1:{port}/0"\ndatabase_url = "sqlite:///{tmp_path / "a.db"}"\n')
    loaded = Settings.load(config)
    make_key(loaded.signing_key_file)
    return loaded


@pytest.fixture
def services(settings: Settings) -> Iterator[Services]:
    with open_services(settings, needs_broker=False) as opened:
        yield opened


@pytest.fixture
def job(services: Services) -> Job:
    added = new_job(JobSpec(name="j", trainer="t", rounds=9), sites=("a",), model_id=None, submitted_by="")
    with writing(services.engine) as connection:
        add_job(connection, added)
    return added


def plan(services: Services, job: Job, number: int, *, second: float) -> Round:
    """Record an open round that was planned so many seconds after the start."""
    moment = START + timedelta(seconds=second)
    planned = Round(
        job_id=job.job_id,
        kind=RoundKind.TRAIN,
        number=number,
        input_model_id=None,
        deadline_at=moment + timedelta(hours=1),
        created_at=moment,
    )
    with writing(services.engine) as connection:
        assert add_round(connection, planned, ("a",))
    return planned


def close(services: Services, planned: Round) -> Round:
    """Close the round."""
    closed = replace(planned, state=RoundState.CLOSED, closed_at=START + timedelta(minutes=1))
    with writing(services.engine) as connection:
        changed = {"state": closed.state.value, "closed_at": closed.closed_at}
        connection.execute(update(rounds).where(rounds.c.round_id == planned.round_id).values(changed))
    return closed


def test_services_without_the_broker_open_only_if_it_is_not_needed(settings: Settings) -> None:
    with pytest.raises(BrokerUnavailable):
        open_services(settings)
    with open_services(settings, needs_broker=False) as services, pytest.raises(RedisError):
        services.broker.ping()


def test_a_broker_url_that_cannot_be_used_is_told_without_its_password(settings: Settings, tmp_path: Path) -> None:
    config = tmp_path / "fedchord.toml"
    config.write_text('broker_url = "amqp://:secret@127.0.0.1/0"\n')
    with pytest.raises(BrokerUnavailable, match="correct FEDCHORD_BROKER_URL") as raised:
        open_services(Settings.load(config), needs_broker=False)
    assert "secret" not in str(raised.value)


def test_progress_since_is_the_same_as_progress(services: Services, job: Job) -> None:
    seen = job_progress(services, job.job_id)
    assert seen.rounds == ()

    def check(*expected: Round) -> None:
        nonlocal seen
        seen = job_progress(services, job.job_id, since=seen)
        assert seen.rounds == expected
        assert seen == job_progress(services, job.job_id)

    first = plan(services, job, 1, second=1)
    check(first)
    first = close(services, first)
    check(first)
    second, third = plan(services, job, 2, second=2), plan(services, job, 3, second=2)  # at the same moment
    check(first, second, third)
    third = close(services, third)
    check(first, second, third)
    second = close(services, second)
    fourth = plan(services, job, 4, second=4)
    check(first, second, third, fourth)


def test_rounds_that_had_ended_are_not_read_again_until_the_job_ends(services: Services, job: Job) -> None:
    ended = [close(services, plan(services, job, number, second=number)) for number in range(1, 6)]
    seen = job_progress(services, job.job_id)
    sixth = plan(services, job, 6, second=6)
    early = plan(services, job, 7, second=0)  # by a coordinator whose clock is behind
    read: list[int] = []

    def count(*_: object) -> None:
        read.append(1)

    event.listen(services.engine, "after_cursor_execute", count)
    seen = job_progress(services, job.job_id, since=seen)
    assert len(read) == 3  # the job, the rounds, the parts of the newest
    assert seen.rounds == (*ended, sixth, early)
    with writing(services.engine) as connection:
        assert end_job(connection, job.job_id, JobState.COMPLETED)
    assert job_progress(services, job.job_id, since=seen).rounds == (*ended, sixth, early)


def test_progress_of_another_job_is_of_no_use(services: Services, job: Job) -> None:
    planned = plan(services, job, 1, second=1)
    seen = job_progress(services, job.job_id)
    other = new_job(JobSpec(name="k", trainer="t", rounds=9), sites=("a",), model_id=None, submitted_by="")
    with writing(services.engine) as connection:
        add_job(connection, other)
    theirs = plan(services, other, 1, second=0)
    assert job_progress(services, other.job_id, since=seen).rounds == (theirs,)
    assert job_progress(services, job.job_id, since=seen).rounds == (planned,)
