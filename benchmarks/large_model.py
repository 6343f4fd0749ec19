"""What a round with a large model costs, beside plain copies of the same bytes through the same store.

    python -m benchmarks.large_model --sites 4 --megabytes 100 --rounds 5 --json

The floor is measured in the same run, by as many processes as there are sites: each copies the model out of the store
and an update into it; then one process copies every update out and a model in. Nothing is hashed, checked or added up.
"""

import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path

import click

from benchmarks.fleet import fleet, run
from benchmarks.report import median, report
from coordinator.jobfile import JobSpec

_FLOOR_ROUNDS = 5


def _copy_in_and_out(model: Path, update: Path, store: Path) -> None:
    shutil.copyfile(model, update)
    shutil.copyfile(update, store)


def floor_seconds(folder: Path, num_sites: int, num_bytes: int) -> float:
    """Return the median time of a round's bytes as plain copies in the store's folder."""
    model = folder / "model"
    model.write_bytes(bytes(num_bytes))
    times = []
    with multiprocessing.get_context("spawn").Pool(num_sites) as pool:
        pool.starmap(_copy_in_and_out, [(model, folder / "warm", folder / "up")])
        for _ in range(_FLOOR_ROUNDS):
            started = time.perf_counter()
            sites = [(model, folder / f"site-{site}", folder / f"update-{site}") for site in range(num_sites)]
            pool.starmap(_copy_in_and_out, sites, chunksize=1)
            for _, _, update in sites:
                shutil.copyfile(update, folder / "read")
            shutil.copyfile(folder / "read", folder / "new")
            times.append(time.perf_counter() - started)
            for path in folder.iterdir():
                if path != model:
                    path.unlink()
    return median(times)


@click.command()
@click.option("--sites", default=4, show_default=True, help="How many sites, each a process of its own.")
@click.option("--megabytes", default=100, show_default=True, help="Size of the model, in 10^6 bytes.")
@click.option("--rounds", default=5, show_default=True, help="Training rounds; the first is not counted.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(sites: int, megabytes: int, rounds: int, as_json: bool) -> None:
    """Run rounds with a large model, and tell what each costs in time and memory."""
    spec = JobSpec(
        name="large-model",
        trainer="constant",
        rounds=rounds,
        min_sites=sites,
        test_every=0,
        config={"megabytes": megabytes},
    )
    with fleet(sites) as services:
        done = run(services, spec)
        with tempfile.TemporaryDirectory(dir=services.blobs.scratch()) as folder:
            floor = floor_seconds(Path(folder), sites, megabytes * 10**6)
    seconds = median(done.intervals)
    moved = (3 * sites + 1) * megabytes / 1000  # out and in by each site, out once more and in by the coordinator
    figures = {
        "sites": sites,
        "megabytes": megabytes,
        "rounds": rounds,
        "seconds_per_round_median": seconds,
        "floor_seconds": floor,
        "ratio": seconds / floor,
        "gigabytes_per_second": moved / seconds,
        "cpu_seconds_per_round": done.cpu_seconds_per_round,
        "coordinator_peak_rss_mb": done.coordinator_peak_rss_mb,
        "total_peak_rss_mb": done.total_peak_rss_mb,
    }
    report("large_model", figures, as_json=as_json)


if __name__ == "__main__":
    main()
