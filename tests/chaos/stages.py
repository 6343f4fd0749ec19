"""A federation of real processes, with something between them and each of their services that can be made to fail."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.jobs import Job
from coordinator.submitting import submit
from store.database import reading
from store.tables import outbox
from tests.chaos import processes
from tests.chaos.invariants import check_always, check_ended
from tests.chaos.processes import Program
from tests.chaos.proxy import Proxy
from tests.chaos.services import Broker, Postgres
from tests.federation import Federation, federation, wait_until
from tests.integration.test_services import s3_settings
from tests.servers import seaweedfs


@dataclass(kw_only=True)
class Stage:
    """The federation, its processes and its services."""

    made: Federation
    coordinators: dict[str, Program]
    sites: dict[str, Program]
    broker: Broker
    broker_proxy: Proxy
    postgres: Postgres | None  # None: SQLite
    store_proxy: Proxy | None  # None: a folder

    @property
    def programs(self) -> list[Program]:
        """Return every process."""
        return [*self.coordinators.values(), *self.sites.values()]

    def revive(self) -> None:
        """Start what does not run, and wait until every site is alive."""
        for program in self.programs:
            if not program.is_running:
                program.start()
        names = tuple(self.sites)
        wait_until(lambda: self.made.alive() == set(names), seconds=60, what="all sites to be alive")

    def submit(self, *, rounds: int, **changes: Any) -> Job:
        """Submit a job in which every site must answer every round, unless the changes say otherwise."""
        values = {"trainer": "slow", "min_sites": len(self.sites), "round_deadline_seconds": 4 * 3600, **changes}
        values["config"] = {"seconds": 0.1, **values.get("config", {})}
        return submit(self.made.services, self.made.spec(rounds=rounds, **values))

    def wait_round(self, job: Job, number: int, *, seconds: float = 60) -> None:
        """Wait until the job has come to the round."""
        wait_until(lambda: self.made.job(job.job_id).current_round >= number, seconds=seconds, what=f"round {number}")

    def is_told(self, job: Job) -> bool:
        """Return whether every site was told of the job's end."""
        with reading(self.made.services.engine) as connection:
            rows = connection.execute(outbox.select().where(outbox.c.job_id == job.job_id)).mappings()
            return {row["site"] for row in rows if row["sent_at"]} == set(self.sites)

    def check(self, job: Job, *, seconds: float = 100) -> None:
        """Wait for the job's end; fail unless its model is the plain loop's and nothing was lost or done twice."""
        self.made.wait(job.job_id, "completed", "failed", "aborted", seconds=seconds)
        check_ended(self.made, job.job_id, num_rounds=job.spec.rounds, whole_chain=True)
        check_always(self.made)


@contextmanager
def stage(
    folder: Path, *sites: str, coordinators: int = 1, services: bool = False, seed: int = 0, **settings: Any
) -> Iterator[Stage]:
    """Run a federation over SQLite and a folder, or over PostgreSQL and SeaweedFS."""
    with ExitStack() as stack:
        broker = stack.enter_context(Broker())
        broker_proxy = stack.enter_context(Proxy(broker.port, seed=seed))
        postgres, store_proxy = None, None
        if services:
            postgres = stack.enter_context(Postgres())
            server = stack.enter_context(seaweedfs())
            store_proxy = stack.enter_context(Proxy(int(server.endpoint.rpartition(":")[2]), seed=seed))
            settings |= s3_settings(server, "jobs")
            settings |= {"s3_endpoint": f"127.0.0.1:{store_proxy.port}", "database_url": postgres.new_database()}
            settings |= {"cache_folder": str(folder / "cache")}
        url = f"redis://127.0.0.1:{broker_proxy.port}/0"
        made = stack.enter_context(federation(folder, *sites, broker_url=url, **settings))
        here = Stage(
            made=made,
            coordinators={
                name: processes.coordinator(made, name) for name in ("first", "second", "third")[:coordinators]
            },
            sites={name: processes.site(made, name, transfer_timeout_seconds=5) for name in sites},
            broker=broker,
            broker_proxy=broker_proxy,
            postgres=postgres,
            store_proxy=store_proxy,
        )
        stack.enter_context(processes.running(*here.programs))
        processes.wait_ready(*here.programs)
        yield here
        for proxy in (broker_proxy, store_proxy):
            if proxy is not None:
                proxy.restore()


def pass_time(seconds: float, *, unless: Callable[[], bool] = lambda: False) -> None:
    """Let a fault last: how long it does is what is tried."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not unless():
        time.sleep(0.02)
