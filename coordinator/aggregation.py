"""Put updates together, piece by piece: memory does not grow with the model or with the number of sites.

The updates are read in one fixed order and each element is computed from its own column alone, so the result is the
same to the bit however the work is cut into blocks and spread over threads.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from coordinator.strategies.base import Block, Strategy
from store.tensors import TensorSpec, numpy_dtype

BLOCK_ELEMENTS = 256 * 1024  # 1 MB of float32: block and sum stay in a core's second-level cache
_MOST_THREADS = 4  # more only wait for memory


class Source(Protocol):
    """A model that can be read in pieces."""

    def read(self, name: str, start: int, out: NDArray[Any]) -> None:
        """Fill `out`, shape (elements,), with the tensor's elements from `start` on."""


class Target(Protocol):
    """A model that can be written in pieces, in any order and from several threads."""

    def write(self, name: str, start: int, block: NDArray[Any]) -> None:
        """Write the tensor's elements from `start` on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    name: str
    spec: TensorSpec
    start: int  # element
    stop: int  # element


def default_threads() -> int:
    """Return how many threads aggregate at once."""
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)))


def shares(num_examples: Sequence[int]) -> tuple[float, ...]:
    """Return each site's share of all examples; they add up to 1."""
    total = sum(num_examples)
    return tuple(count / total for count in num_examples)


def aggregate(
    strategy: Strategy,
    schema: Mapping[str, TensorSpec],
    sources: Sequence[Source],
    num_examples: Sequence[int],
    target: Target,
    *,
    threads: int | None = None,
) -> None:
    """Write the strategy's combination of the sources to the target.

    Floating tensors of 32 bits and fewer are combined in float32, float64 in float64, each rounded once at the end; a
    complex tensor counts as its real and imaginary parts. Integers and booleans are not averaged: the largest value
    is taken, element by element, which keeps counters (a batch norm's `num_batches_tracked`) whole and growing.
    """
    weights = shares(num_examples)
    threads = threads or default_threads()

    def combine(piece: _Piece) -> None:
        target.write(piece.name, piece.start, _combine(strategy, piece, sources, weights))

    pieces = list(_pieces(schema))
    if threads == 1 or sum(piece.stop - piece.start for piece in pieces) < 4 * BLOCK_ELEMENTS:  # not worth a thread
        for piece in pieces:
            combine(piece)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="aggregate") as pool:
        for _ in pool.map(combine, pieces):
            pass


def _pieces(schema: Mapping[str, TensorSpec]) -> Iterator[_Piece]:
    for name, spec in schema.items():
        for start in range(0, spec.num_elements, BLOCK_ELEMENTS):
            yield _Piece(name=name, spec=spec, start=start, stop=min(start + BLOCK_ELEMENTS, spec.num_elements))


def _combine(strategy: Strategy, piece: _Piece, sources: Sequence[Source], weights: tuple[float, ...]) -> NDArray[Any]:
    dtype = numpy_dtype(piece.spec.dtype)
    raw: NDArray[Any] = np.empty(piece.stop - piece.start, dtype)
    if dtype.kind in "biu":
        return _largest(piece, sources, raw)
    real = raw.view(raw.real.dtype) if dtype.kind == "c" else raw
    work = np.dtype(np.float64 if real.dtype == np.float64 else np.float32)

    def blocks() -> Iterator[Block]:
        converted = real if real.dtype == work else np.empty(real.shape, work)
        for source in sources:
            source.read(piece.name, piece.start, raw)
            if converted is not real:
                converted[:] = real
            yield converted

    out = np.empty(real.shape, work)
    strategy.combine(blocks(), weights, out)
    rounded: NDArray[Any] = out.astype(real.dtype, copy=False)
    return rounded.view(dtype)


def _largest(piece: _Piece, sources: Sequence[Source], raw: NDArray[Any]) -> NDArray[Any]:
    largest = np.empty_like(raw)
    for position, source in enumerate(sources):
        source.read(piece.name, piece.start, raw)
        if position == 0:
            largest[:] = raw
        else:
            np.maximum(largest, raw, out=largest)
    return largest


def weighted_metrics(metrics: Sequence[Mapping[str, float | None]], num_examples: Sequence[int]) -> dict[str, float]:
    """Return the mean of each metric over the sites that have it, weighted by examples; what is missing is not zero."""
    names = sorted({name for site in metrics for name in site})
    means = {}
    for name in names:
        known = [
            (value, count)
            for site, count in zip(metrics, num_examples, strict=True)
            if (value := site.get(name)) is not None
        ]
        if total := sum(count for _, count in known):
            mean = sum(value * count for value, count in known) / total
            if math.isfinite(mean):  # one site's absurd value may overflow, and neither JSON nor anybody can use that
                means[name] = mean
    return means
