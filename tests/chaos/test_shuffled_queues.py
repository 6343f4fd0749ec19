"""Every message may come twice and in any order, to two coordinators at once: same bits, one aggregation a round."""

from contextlib import ExitStack
from pathlib import Path

from common.queues import COORDINATOR_QUEUE, site_queue
from coordinator.submitting import submit
from tests.chaos import play, processes
from tests.chaos.imp import imp
from tests.chaos.table import Table
from tests.federation import federation, wait_until


def test_messages_that_are_doubled_and_shuffled_change_no_bit(
    tmp_path: Path, full: bool, seed: int, table: Table
) -> None:
    num_jobs = 30 if full else 6
    queues = [COORDINATOR_QUEUE, *(site_queue(name) for name in play.SITES)]
    with federation(tmp_path, *play.SITES) as made, ExitStack() as stack:
        programs = [processes.coordinator(made, name) for name in ("first", "second")]
        stack.enter_context(processes.running(*programs))
        processes.wait_ready(*programs)
        stack.enter_context(play.playing(made))
        url = made.services.settings.broker_url.get_secret_value()
        with imp(url, queues, seed=seed) as doubled:
            jobs = [submit(made.services, play.spec(made)).job_id for _ in range(num_jobs)]
            for job_id in jobs:
                made.wait(job_id, "completed", "failed", seconds=100)
        for job_id in jobs:
            wait_until(play.is_played(made, job_id), what="the last notice")
    assert sum(doubled) > 10 * num_jobs
    table.record("every message may come twice and in any order", "always, two coordinators", runs=num_jobs)
