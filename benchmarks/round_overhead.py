"""What a round costs when training costs nothing, beside the same bytes and messages moved one after the other.

    python -m benchmarks.round_overhead --sites 10 --rounds 20 --kilobytes 100 --json

Every site is a process of its own (`celery -A worker worker`). The floor is measured in the same run: for each site one
message through the broker and back, one copy of the model read and one update written in the object store.
"""

import tempfile
import time
from pathlib import Path

import click
import numpy as np

from benchmarks.fleet import fleet, run
from benchmarks.report import median, report
from coordinator.jobfile import JobSpec
from coordinator.services import Services
from store.blobs import Blob, hash_file
from store.tensors import write_shard
from store.transfer import Transfer

_FLOOR_ROUNDS = 10
_MESSAGE = b"x" * 2000  # about what a round's message is long


def floor_seconds(services: Services, num_sites: int, num_bytes: int) -> float:
    """Return the median time of a round's bytes and messages, moved by one process with nothing around it."""
    transfer = Transfer(shared_folder=services.settings.blob_folder, timeout_seconds=60)
    times = []
    with tempfile.TemporaryDirectory(dir=services.blobs.scratch()) as name:
        folder = Path(name)
        for number in range(_FLOOR_ROUNDS):
            model = _file(folder / f"{number}-model", num_bytes, (number, num_sites))
            files = [_file(folder / f"{number}-{site}", num_bytes, (number, site)) for site in range(num_sites)]
            stored = services.blobs.put(model[0], blob=model[1])
            started = time.perf_counter()
            for site, (path, blob) in enumerate(files):
                services.broker.lpush("benchmark", _MESSAGE)
                services.broker.brpop(["benchmark"])
                fetched = transfer.fetch(services.blobs.read_url(stored, seconds=60), stored, folder)
                fetched.unlink()
                slot = f"benchmark/{number}/{site}"
                transfer.upload(path, services.blobs.write_url(slot, seconds=60))
                services.broker.lpush("benchmark", _MESSAGE)
                services.broker.brpop(["benchmark"])
                services.blobs.accept(slot, blob)
            times.append(time.perf_counter() - started)
    return median(times)


def _file(path: Path, num_bytes: int, seed: tuple[int, int]) -> tuple[Path, Blob]:
    values = np.random.default_rng(seed).random(num_bytes // 4, np.float32)
    write_shard(path, {"w": values})
    return path, hash_file(path)


@click.command()
@click.option("--sites", default=10, show_default=True, help="How many sites, each a process of its own.")
@click.option("--rounds", default=20, show_default=True, help="Training rounds; the first is not counted.")
@click.option("--kilobytes", default=100, show_default=True, help="Size of the model, in 10^3 bytes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(sites: int, rounds: int, kilobytes: int, as_json: bool) -> None:
    """Run rounds of a trainer that only adds a constant, and tell what each costs."""
    spec = JobSpec(
        name="round-overhead",
        trainer="constant",
        rounds=rounds,
        min_sites=sites,
        test_every=0,
        config={"megabytes": kilobytes / 1000},
    )
    with fleet(sites) as services:
        done = run(services, spec)
        floor = floor_seconds(services, sites, kilobytes * 1000)
    seconds = median(done.intervals)
    figures = {
        "sites": sites,
        "rounds": rounds,
        "kilobytes": kilobytes,
        "seconds_per_round_median": seconds,
        "seconds_per_round_worst": max(done.intervals),
        "floor_seconds": floor,
        "ratio": seconds / floor,
        "cpu_seconds_per_round": done.cpu_seconds_per_round,
        "coordinator_peak_rss_mb": done.coordinator_peak_rss_mb,
        "total_peak_rss_mb": done.total_peak_rss_mb,
        "processes": done.num_processes,
    }
    report("round_overhead", figures, as_json=as_json)


if __name__ == "__main__":
    main()
