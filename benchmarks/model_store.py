"""What the model store's service costs, beside the S3 client's own transfers with the same server.

    python -m benchmarks.model_store --megabytes 1000 --runs 3 --json

SeaweedFS keeps the blobs and SQLite the records. The floor of a transfer is `fput_object` and `fget_object` of the same
number of bytes, in turn with ours in the same run; that of a question is the shortest call that there is.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import minio
import psutil

from benchmarks.report import median, report
from store.blobs import BLOCK_BYTES
from store.client import Api
from store.database import writing
from store.models import ModelInfo, ModelState, add_model
from store.opening import open_store
from tests.servers import seaweedfs
from tests.store_server import StoreServer, store_server

_STORE = "ddc:benchmark"
_MANY = "ddc:many"
_BUCKET = "floor"
_AT_ONCE = 8
_CALLS = 50


class Bench:
    """A service, its client, and the client of the server behind it."""

    def __init__(self, folder: Path, server: StoreServer, client: minio.Minio) -> None:
        self.folder = folder
        self.server = server
        self.client = client
        self.api = Api(server.url)
        self._block = os.urandom(BLOCK_BYTES)
        self._count = 0

    def new_file(self, megabytes: int) -> Path:
        """Write a file of bytes that nobody has stored."""
        self._count += 1
        path = self.folder / f"file-{self._count}"
        with path.open("wb") as file:
            file.write(os.urandom(32))
            left = megabytes * 10**6 - 32
            while left > 0:
                left -= file.write(self._block[:left])
        return path

    def put(self, path: Path) -> str:
        """Put the file through the service; return the model's id."""
        return str(self.api.put_model(_STORE, path)["model_id"])

    def load(self, model_id: str, path: Path) -> None:
        """Load the model through the service into a file."""
        with path.open("wb", buffering=0) as file:
            for block in self.api.load_model(_STORE, model_id):
                file.write(block)

    def empty_cache(self) -> None:
        """Forget the copies that the service keeps beside the object store."""
        for path in (self.server.folder / "cache" / "blobs").iterdir():
            path.unlink()


def seconds(action: Callable[[], object]) -> float:
    """Return how long the action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def transfers(bench: Bench, megabytes: int, runs: int) -> dict[str, float]:
    """Time one transfer at a time."""
    times: dict[str, list[float]] = {}
    target = bench.folder / "target"
    for run in range(runs):
        model = bench.new_file(megabytes)
        key = f"file-{run}"
        ids: list[str] = []
        steps: dict[str, Callable[[], object]] = {
            "put_floor": lambda model=model, key=key: bench.client.fput_object(_BUCKET, key, str(model)),  # type: ignore[misc]  # bound
            "put": lambda model=model, ids=ids: ids.append(bench.put(model)),  # type: ignore[misc]  # bound
            "load_floor": lambda key=key: bench.client.fget_object(_BUCKET, key, str(target)),  # type: ignore[misc]  # bound
            "load_warm": lambda ids=ids: bench.load(ids[0], target),  # type: ignore[misc]  # bound
            "load_cold": lambda ids=ids: bench.load(ids[0], target),  # type: ignore[misc]  # bound
        }
        for name, step in steps.items():
            if name == "load_cold":
                bench.empty_cache()
            times.setdefault(name, []).append(seconds(step))
            target.unlink(missing_ok=True)
        model.unlink()
        bench.client.remove_object(_BUCKET, key)
        bench.api.delete_model(_STORE, ids[0])
    found = {f"{name}_seconds": median(each) for name, each in times.items()}
    found["put_ratio"] = found["put_seconds"] / found["put_floor_seconds"]
    for kind in ("warm", "cold"):
        found[f"load_{kind}_ratio"] = found[f"load_{kind}_seconds"] / found["load_floor_seconds"]
    return found


def at_once(bench: Bench, megabytes: int) -> dict[str, float]:
    """Time several transfers at once, and tell the most memory that the service had in all this."""
    files = [bench.new_file(megabytes) for _ in range(_AT_ONCE)]
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        ids: list[str] = []
        put = seconds(lambda: ids.extend(threads.map(bench.put, files)))
        bench.empty_cache()
        targets = [path.with_suffix(".loaded") for path in files]
        load = seconds(lambda: list(threads.map(bench.load, ids, targets)))
    for path in (*files, *targets):
        path.unlink()
    return {"put_8_at_once_seconds": put, "load_8_at_once_seconds": load, "service_peak_rss_mb": peak_rss_mb(bench)}


def questions(bench: Bench, num_models: int) -> dict[str, float]:
    """Time questions about a model store of many models."""
    bench.api.initialize_model_store(_MANY)
    with open_store(bench.server.settings) as opened, writing(opened.engine) as connection:
        for number in range(num_models):
            state = (ModelState.CREATED, ModelState.FEEDBACKED, ModelState.AGGREGATED, ModelState.TRANSFERRED)[
                number % 4
            ]
            info = ModelInfo(
                store=_MANY, model_hash=f"{number:064x}", model_size=1, model_state=state, round=number // 100
            )
            add_model(connection, info)
    page = {"and": [{"=": ["model_state", 20]}, {">": ["round", num_models // 300]}]}
    calls: dict[str, Callable[[], object]] = {
        "call_floor": bench.api.get_server_version,
        "latest": lambda: bench.api.get_model_info_latest(_MANY),
        "latest_aggregated": lambda: bench.api.get_latest_aggregated_model(_MANY),
        "latest_feedbacked": lambda: bench.api.get_latest_feedbacked_models(_MANY),
        "page_of_50": lambda: bench.api.get_models(_MANY, conds=page, offset=10, limit=50, order="-round"),
    }
    return {f"{name}_ms": 1000 * median([seconds(call) for _ in range(_CALLS)]) for name, call in calls.items()}


def peak_rss_mb(bench: Bench) -> float:
    """Return the most memory that the service has had, in 10^6 bytes."""
    path = Path(f"/proc/{bench.server.process.pid}/status")
    if not path.exists():  # not Linux: what it has now
        return psutil.Process(bench.server.process.pid).memory_info().rss / 1e6
    return int(path.read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


@click.command()
@click.option("--megabytes", default=1000, show_default=True, help="Size of a model, in 10^6 bytes.")
@click.option("--runs", default=3, show_default=True, help="How often each transfer is made; the median is told.")
@click.option("--parallel-megabytes", default=250, show_default=True, help="Size of each of 8 models at once.")
@click.option(
    "--models", default=10_000, show_default=True, help="How many models the model store of the questions has."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(megabytes: int, runs: int, parallel_megabytes: int, models: int, as_json: bool) -> None:
    """Put and load models through the service, one and eight at a time, and ask for models among many."""
    with tempfile.TemporaryDirectory(prefix="fedchord-bench-") as name, seaweedfs() as s3:
        folder = Path(name)
        client = s3.client()
        client.make_bucket(_BUCKET)
        service_folder = folder / "service"
        service_folder.mkdir()
        settings = {
            "blob_store": "s3",
            "s3_endpoint": s3.endpoint,
            "s3_access_key": s3.access_key,
            "s3_secret_key": s3.secret_key,
            "s3_secure": "false",
        }
        with store_server(service_folder, **settings) as server:
            bench = Bench(folder, server, client)
            bench.api.initialize_model_store(_STORE)
            figures = {
                "megabytes": megabytes,
                "runs": runs,
                **transfers(bench, megabytes, runs),
                **at_once(bench, parallel_megabytes),
                "models": models,
                **questions(bench, models),
            }
        shutil.rmtree(service_folder)
    report("model_store", figures, as_json=as_json)


if __name__ == "__main__":
    main()
