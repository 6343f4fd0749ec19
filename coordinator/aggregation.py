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

from common.errors import InvalidInput, InvalidTensors
from coordinator.strategies.base import Block, Strategy
from coordinator.strategies.optimizer import ServerOptimizer
from store.tensors import TensorSpec, numpy_dtype

BLOCK_ELEMENTS = 256 * 1024  # 1 MB of float32: block and sum stay in a core's second-level cache
_MOST_THREADS = 4  # more only wait for memory
_STATE_DTYPES = {"F64": "F64", "C64": "C64"}  # of an optimizer's tensors, for these dtypes of the model's; else F32


class Source(Protocol):
    """A model that can be read in pieces."""

    def read(self, name: str, start: int, out: NDArray[Any]) -> None:
        """Fill `out`, shape (elements,), with the tensor's elements from `start` on."""


class Target(Protocol):
    """A model that can be written in pieces, in any order and from several threads."""

    def write(self, name: str, start: int, block: NDArray[Any]) -> None:
        """Write the tensor's elements from `start` on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contribution:
    """An update, and what it counts for."""

    update: Source
    num_examples: int
    staleness: int = 0  # rounds between the one that it was trained in and this one
    base: Source | None = None  # the model that it was trained from; of a stale one


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """A server optimizer's own tensors, `<state name>/<tensor>`, before and after the round."""

    before: Mapping[str, Source] | None  # a reader for each state name, as they are read in turn; None: zeros
    after: Target


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    name: str
    spec: TensorSpec
    start: int  # element
    stop: int  # element


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sum:
    """What is the same for all pieces."""

    strategy: Strategy
    contributions: Sequence[Contribution]
    weights: tuple[float, ...]  # one for each contribution, and one for the current model if something is left for it
    current: Source | None
    moments: Moments | None


def default_threads() -> int:
    """Return how many threads aggregate at once."""
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)))


def shares(num_examples: Sequence[int]) -> tuple[float, ...]:
    """Return each site's share of all examples; they add up to 1."""
    total = sum(num_examples)
    return tuple(count / total for count in num_examples)


def weigh(num_examples: Sequence[int], staleness: Sequence[int], discount: float) -> tuple[float, ...]:
    """Return what each update counts for: its share of all examples, times (1 + staleness) ** -discount.

    An update that is not stale counts for its share, exactly.
    """
    stale = zip(shares(num_examples), staleness, strict=True)
    return tuple(share * (1 + rounds) ** -discount if rounds else share for share, rounds in stale)


def aggregate(
    strategy: Strategy,
    schema: Mapping[str, TensorSpec],
    contributions: Sequence[Contribution],
    target: Target,
    *,
    current: Source | None = None,
    discount: float = 0.0,
    moments: Moments | None = None,
    threads: int | None = None,
) -> None:
    """Write what the strategy makes of the contributions to the target.

    Floating tensors of 32 bits and fewer are combined in float32, float64 in float64, each rounded once at the end; a
    complex tensor counts as its real and imaginary parts. Integers and booleans are not averaged: the largest value
    is taken, element by element, which keeps counters (a batch norm's `num_batches_tracked`) whole and growing.

    A stale update counts with what it changes in its base, added to the `current` model of the round: what it says of
    the way is kept, and what others have done since is not undone. Its weight is discounted by its staleness, and
    what that leaves is the current model's. So the new model is current + sum of weight * (update - base), which is
    FedBuff's rule, with FedAsync's polynomial discount.

    A server optimizer is given its `moments`, without which it averages only. Raise InvalidTensors if a stale update
    or its step leads to something that is not finite.

    Sources: Nguyen et al., Federated Learning with Buffered Asynchronous Aggregation, arXiv 2106.06639; Xie et al.,
    Asynchronous Federated Optimization, arXiv 1903.03934.
    """
    examples = [each.num_examples for each in contributions]
    weights = weigh(examples, [each.staleness for each in contributions], discount)
    left = 1 - math.fsum(weights)
    if strategy.is_weighted and discount > 0 and left > 0 and any(each.staleness for each in contributions):
        weights = (*weights, left)
    work = _Sum(strategy=strategy, contributions=contributions, weights=weights, current=current, moments=moments)
    threads = threads or default_threads()

    def combine(piece: _Piece) -> None:
        target.write(piece.name, piece.start, _combine(work, piece))

    pieces = list(_pieces(schema))
    if threads == 1 or sum(piece.stop - piece.start for piece in pieces) < 4 * BLOCK_ELEMENTS:  # not worth a thread
        for piece in pieces:
            combine(piece)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="aggregate") as pool:
        for _ in pool.map(combine, pieces):
            pass


def state_schema(strategy: ServerOptimizer, schema: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return the tensors that the optimizer keeps for a model: of each floating one, in the dtype of its sums."""
    return {
        f"{state}/{name}": TensorSpec(dtype=_STATE_DTYPES.get(spec.dtype, "F32"), shape=spec.shape)
        for state in strategy.state_names
        for name, spec in schema.items()
        if numpy_dtype(spec.dtype).kind not in "biu"
    }


def _pieces(schema: Mapping[str, TensorSpec]) -> Iterator[_Piece]:
    for name, spec in schema.items():
        for start in range(0, spec.num_elements, BLOCK_ELEMENTS):
            yield _Piece(name=name, spec=spec, start=start, stop=min(start + BLOCK_ELEMENTS, spec.num_elements))


class _Buffer:
    """Room for one piece of a model, in its own dtype and as the real numbers that are computed with."""

    def __init__(self, piece: _Piece) -> None:
        self._piece = piece
        self._raw: NDArray[Any] = np.empty(piece.stop - piece.start, numpy_dtype(piece.spec.dtype))
        self._real = _as_real(self._raw)
        work = np.dtype(np.float64 if self._real.dtype == np.float64 else np.float32)
        self._block: Block = self._real if self._real.dtype == work else np.empty(self._real.shape, work)

    def read(self, source: Source) -> Block:
        """Return the source's piece; the next call overwrites it."""
        source.read(self._piece.name, self._piece.start, self._raw)
        if self._block is not self._real:
            self._block[:] = self._real
        return self._block

    def new_block(self) -> Block:
        """Return another block of the same shape and dtype, not initialized."""
        return np.empty_like(self._block)

    def rounded(self, block: Block) -> NDArray[Any]:
        """Return the block's numbers in the tensor's own dtype."""
        rounded: NDArray[Any] = block.astype(self._real.dtype, copy=False)
        return rounded.view(self._raw.dtype)


def _as_real(array: NDArray[Any]) -> NDArray[Any]:
    """Return the array, or the real and imaginary parts of a complex one, in turn; nothing is copied."""
    return array.view(array.real.dtype) if array.dtype.kind == "c" else array


def _combine(work: _Sum, piece: _Piece) -> NDArray[Any]:
    if numpy_dtype(piece.spec.dtype).kind in "biu":
        return _largest(work.contributions, piece)
    buffer = _Buffer(piece)
    out = buffer.new_block()
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found below
        work.strategy.combine(_blocks(work, piece, buffer), work.weights, out)
        if work.moments is not None:
            _step(work, work.moments, piece, buffer, out)
        rounded = buffer.rounded(out)
    if work.current is not None and not np.isfinite(_as_real(rounded)).all():
        raise InvalidTensors(
            f"Tensor {piece.name!r} is not finite any more after this round; lower the strategy's "
            "server_learning_rate, or the sites' learning rate."
        )
    return rounded


def _blocks(work: _Sum, piece: _Piece, buffer: _Buffer) -> Iterator[Block]:
    """Yield a block for each weight; of a stale update what it changes, added to the current model."""
    other: _Buffer | None = None
    for each in work.contributions:
        block = buffer.read(each.update)
        if each.staleness:
            other = other or _Buffer(piece)
            np.subtract(block, other.read(_known(each.base)), out=block)
            np.add(block, other.read(_known(work.current)), out=block)
        yield block
    if len(work.weights) > len(work.contributions):
        yield buffer.read(_known(work.current))


def _known(source: Source | None) -> Source:
    if source is None:
        raise InvalidInput("A stale update or an optimizer needs the models that it starts from; give them, too.")
    return source


def _step(work: _Sum, moments: Moments, piece: _Piece, buffer: _Buffer, out: Block) -> None:
    """Let the optimizer turn the mean in `out` into the new model; write its state."""
    if not isinstance(work.strategy, ServerOptimizer):
        raise InvalidInput(f"{type(work.strategy).__name__} keeps no moments; give it none.")
    names = [f"{state}/{piece.name}" for state in work.strategy.state_names]
    dtype = numpy_dtype(_STATE_DTYPES.get(piece.spec.dtype, "F32"))
    kept = [np.zeros(piece.stop - piece.start, dtype) for _ in names]
    if moments.before is not None:
        for state, name, array in zip(work.strategy.state_names, names, kept, strict=True):
            moments.before[state].read(name, piece.start, array)
    work.strategy.step(buffer.read(_known(work.current)), tuple(map(_as_real, kept)), out)
    for name, array in zip(names, kept, strict=True):
        if not np.isfinite(_as_real(array)).all():
            raise InvalidTensors(
                f"The optimizer's {name!r} is not finite any more after this round; lower the sites' learning rate."
            )
        moments.after.write(name, piece.start, array)


def _largest(contributions: Sequence[Contribution], piece: _Piece) -> NDArray[Any]:
    raw: NDArray[Any] = np.empty(piece.stop - piece.start, numpy_dtype(piece.spec.dtype))
    largest = np.empty_like(raw)
    for position, each in enumerate(contributions):
        each.update.read(piece.name, piece.start, raw)
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
