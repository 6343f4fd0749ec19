"""How fast stored updates become a model, beside the machine's own blocked multiply-add on arrays in memory.

python -m benchmarks.aggregate --updates 10 --megabytes 100 --json
"""

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
from numpy.typing import NDArray

from benchmarks.report import median, report
from coordinator.aggregation import BLOCK_ELEMENTS, Contribution, aggregate, default_threads
from coordinator.strategies.fedavg import FedAvg
from store.folder import FolderStore
from store.pieces import WeightsReader, WeightsWriter
from store.weights import store_weights

_TENSORS = 8  # of equal size, as a model's large layers are
_SHARD_BYTES = 256 * 2**20


def _floor(arrays: list[NDArray[np.float32]], weight: float, threads: int) -> None:
    """Add up the weighted arrays block by block, in memory, with nothing around it."""
    size = arrays[0].size
    out = np.empty(size, np.float32)

    def add(start: int) -> None:
        block = slice(start, min(start + BLOCK_ELEMENTS, size))
        product = np.empty(block.stop - start, np.float32)
        total = out[block]
        total.fill(0)
        for array in arrays:
            np.multiply(array[block], np.float32(weight), out=product)
            np.add(total, product, out=total)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(add, range(0, size, BLOCK_ELEMENTS)))


def _in_turn(first: Callable[[], object], second: Callable[[], object], runs: int) -> tuple[float, float]:
    """Return the median seconds of each, run in turn, so that a change of the machine's speed meets both."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for work, seconds in zip((first, second), times, strict=True):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
    return median(times[0]), median(times[1])


@click.command()
@click.option("--updates", default=10, show_default=True, help="How many updates are combined.")
@click.option("--megabytes", default=100, show_default=True, help="Size of each, in 10^6 bytes.")
@click.option("--runs", default=5, show_default=True, help="Timed runs; the median counts.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(updates: int, megabytes: int, runs: int, as_json: bool) -> None:
    """Aggregate updates from a local blob store, beside the same sums over arrays in memory."""
    elements = megabytes * 10**6 // 4 // _TENSORS
    gigabytes = updates * elements * _TENSORS * 4 / 1e9
    threads = default_threads()
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        store = FolderStore(Path(folder))
        store.prepare()
        stored = []
        for _ in range(updates):
            tensors = {f"t{number}": generator.random(elements, np.float32) for number in range(_TENSORS)}
            stored.append(store_weights(store, tensors, _SHARD_BYTES))
        del tensors
        arrays = [generator.random(elements * _TENSORS, np.float32) for _ in range(updates)]
        before = psutil.Process().memory_info().rss

        def ours() -> None:
            with ExitStack() as stack:
                sources = [stack.enter_context(WeightsReader(store, weights)) for weights in stored]
                contributions = [Contribution(update=source, num_examples=1) for source in sources]
                target = stack.enter_context(WeightsWriter(store, stored[0].schema, _SHARD_BYTES))
                aggregate(FedAvg(), stored[0].schema, contributions, target)

        ours()
        memory = (psutil.Process().memory_info().rss - before) / 1e6
        seconds, floor_seconds = _in_turn(ours, lambda: _floor(arrays, 1 / updates, threads), runs)
    rates: dict[str, Any] = {
        "updates": updates,
        "megabytes": megabytes,
        "threads": threads,
        "gigabytes_per_second": gigabytes / seconds,
        "floor_gigabytes_per_second": gigabytes / floor_seconds,
        "ratio": floor_seconds / seconds,
        "memory_growth_mb": memory,
    }
    report("aggregate", rates, as_json=as_json)


if __name__ == "__main__":
    main()
