"""Measure how far an update is from the global model, and find those that are far further than the others of a round.

The distance is the L2 norm of (update - global model) over all floating tensors. It is measured in the pass that looks
for values that are not finite, so the update is read once; the global model is read beside it, a block at a time.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median, median_low
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from common.errors import InvalidTensors, UpdateRejected
from store.blobs import BlobStore
from store.index import Weights
from store.tensors import Array, TensorLocation, TensorSpec, numpy_dtype, read_header, read_into

_BLOCK_ELEMENTS = 64 * 1024  # read and measured at a time: three blocks of it stay in a core's second-level cache
_SECOND = "second/"  # begins the name of a second moment in the answer to a SWAG round

_LEAST_ANSWERS = 4  # of fewer, neither median nor spread says much
_FIXED_FACTOR = 1000.0  # times the median, for fewer answers than that
_LEAST_SPREAD = 0.2249  # of decimal logarithms; then a score of 6 needs a factor of 100, a score of 3 one of 10
_LEAST_MOVE = 0.1  # of the global model's own norm; who moves it by less than that cannot wreck it
_NORMAL = 0.6745  # the median absolute deviation of a normal distribution, in standard deviations


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far an update is from the global model."""

    update_norm: float  # L2, of update - global model
    global_norm: float  # L2, of the global model itself
    is_zero: bool  # whether every floating value of the update is zero


class Reference:
    """Read what an update is held against: the global model or, for moments, those of weights that stand still there.

    It holds one file open at a time and reads each shard's header once, in whatever order it is asked.
    """

    def __init__(self, store: BlobStore, weights: Weights, schema: Mapping[str, TensorSpec], *, moments: bool) -> None:
        self._store = store
        self._weights = weights
        self._schema = schema  # what the update must hold
        self._moments = moments
        self._headers: dict[int, Mapping[str, TensorLocation]] = {}  # by the shard's position
        self._file: BinaryIO | None = None
        self._position = -1  # of the shard whose file is open
        self._buffer = np.empty(0, np.uint8)

    def __enter__(self) -> Self:
        """Return the reference."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the open file."""
        if self._file is not None:
            self._file.close()
            self._file, self._position = None, -1

    def holds(self, name: str, spec: TensorSpec) -> bool:
        """Return whether the update must hold just this tensor; of another there is nothing to read."""
        return self._schema.get(name) == spec

    def position(self, name: str) -> int:
        """Return the number of the shard that is read for the tensor, and the same one for all that cannot be."""
        return self._weights.shard_of.get(self._name(name), -1)

    def read(self, name: str, start: int, count: int, dtype: np.dtype[np.float32] | np.dtype[np.float64]) -> Array:
        """Return so many elements from `start` on, as real numbers of the dtype; the next read may overwrite them."""
        own = self._name(name)
        spec = self._weights.schema[own]
        own_dtype = numpy_dtype(spec.dtype)
        if self._buffer.size < count * own_dtype.itemsize:
            self._buffer = np.empty(count * own_dtype.itemsize, np.uint8)
        raw = self._buffer[: count * own_dtype.itemsize]
        location = self._locations(self._weights.shard_of[own]).get(own)
        if location is None or location.spec != spec:
            raise InvalidTensors(f"Tensor {own!r} is not in its shard as the index says; store the model again.")
        assert self._file is not None
        read_into(self._file, location.begin + start * own_dtype.itemsize, raw.data)
        values: Array = _real(raw.view(own_dtype)).astype(dtype, copy=False)
        return np.square(values) if self._moments and name.startswith(_SECOND) else values

    def _name(self, name: str) -> str:
        """Return the global model's name for what the update calls so."""
        return name.partition("/")[2] if self._moments else name  # it begins with first/ or second/

    def _locations(self, position: int) -> Mapping[str, TensorLocation]:
        if position != self._position:
            self.__exit__(None, None, None)
            self._file = self._store.open(self._weights.shards[position])
            self._position = position
            if position not in self._headers:
                self._headers[position] = read_header(self._file, self._weights.shards[position].size)
        return self._headers[position]


class Measure:
    """Look at an update's shards, one after the other; refuse what is not finite and add up the distance."""

    def __init__(self, reference: Reference | None = None) -> None:
        self._reference = reference
        self._work = np.empty(0, np.float32)
        self._moved = 0.0  # sum of squares of update - global model
        self._whole = 0.0  # of the global model
        self._is_zero = True

    def look(self, file: BinaryIO, locations: Mapping[str, TensorLocation]) -> None:
        """Raise UpdateRejected, naming the first tensor, unless every floating value in the shard's file is finite."""
        names = list(locations)
        if self._reference is not None:
            names.sort(key=self._reference.position)  # else a file of the global model would be opened for each tensor
        with np.errstate(over="ignore", invalid="ignore"):  # told by the sums
            for name in names:
                dtype = numpy_dtype(locations[name].spec.dtype)
                if dtype.kind not in "biu":
                    self._look_at(file, name, locations[name], dtype)

    def distance(self) -> Distance:
        """Return what all shards together come to; raise UpdateRejected if that is more than a number can hold."""
        moved, whole = math.sqrt(self._moved), math.sqrt(self._whole)
        if not math.isfinite(moved):
            raise UpdateRejected("The update is further from the global model than a number can say.")
        return Distance(update_norm=moved, global_norm=whole, is_zero=self._is_zero)

    def _look_at(self, file: BinaryIO, name: str, location: TensorLocation, dtype: np.dtype[np.generic]) -> None:
        total = location.spec.num_elements
        buffer = np.empty(min(total, _BLOCK_ELEMENTS), dtype)
        is_measured = self._reference is not None and self._reference.holds(name, location.spec)
        for start in range(0, total, _BLOCK_ELEMENTS):
            block = buffer[: min(_BLOCK_ELEMENTS, total - start)]
            read_into(file, location.begin + start * dtype.itemsize, block.view(np.uint8).data)
            if not is_measured or not self._add(name, start, block):
                _check_finite(name, start, block)

    def _add(self, name: str, start: int, block: Array) -> bool:
        """Add the block's share; return whether that alone shows that all of it is finite, as it nearly always does."""
        assert self._reference is not None
        values = _real(block)
        expected = self._reference.read(name, start, block.size, values.dtype)
        if self._work.dtype != values.dtype or self._work.size < values.size:
            self._work = np.empty(values.size, values.dtype)
        work = self._work[: values.size]
        np.subtract(values, expected, out=work)
        moved = _sum_of_squares(work, work)
        if not math.isfinite(moved):  # not finite, or its square is not
            wide = values.astype(np.float64) - expected.astype(np.float64)
            moved = _sum_of_squares(wide, wide)
        whole = _sum_of_squares(expected, work)
        if not math.isfinite(whole):
            wide = expected.astype(np.float64)
            whole = _sum_of_squares(wide, wide)
        self._moved += moved
        self._whole += whole
        self._is_zero = self._is_zero and not values.any()
        return math.isfinite(moved)


def _real(block: Array) -> Array:
    """Return the numbers as float32 or float64; a complex one is two."""
    real: Array = block.view(block.real.dtype) if block.dtype.kind == "c" else block
    return real if real.dtype in (np.float32, np.float64) else real.astype(np.float32)


def _sum_of_squares(values: Array, work: Array) -> float:
    """Return the sum, added pairwise in one fixed order, so that it is the same whenever it is repeated."""
    np.square(values, out=work)
    return float(np.add.reduce(work))


def _check_finite(name: str, start: int, block: Array) -> None:
    if not np.isfinite(block).all():
        first = int(np.flatnonzero(~np.isfinite(block))[0])
        value = "NaN" if np.isnan(block[first]) else "infinite"
        raise UpdateRejected(f"Tensor {name!r} is not finite: element {start + first} is {value}.")


def find_outliers(distances: Mapping[str, tuple[float, float]], limit: float) -> dict[str, str]:
    """Return the reason for each name whose update is too far from the global model, compared with the other updates.

    `distances` holds the norms of (update - global model) and of the global model by name; a limit of 0 finds none.

    The score is the modified z-score of the norm's decimal logarithm, 0.6745 (x - median) / MAD, with the median
    absolute deviation: unlike mean and deviation, neither follows a minority, however large its values. Source:
    Iglewicz and Hoaglin, How to Detect and Handle Outliers, ASQC 1993, who take 3.5 for normal data. Norms of honest
    sites are not so well behaved: they follow the sites' amounts of data and steps. So the spread counts as 0.225 at
    least, and nobody is an outlier who moves the model by less than a tenth of its own norm, or less than the median.
    """
    known = {name: norm for name, (norm, _) in distances.items() if norm > 0}  # no change at all is no outlier
    if limit <= 0 or len(known) < 2:
        return {}
    far = {name: norm for name, norm in known.items() if norm > _LEAST_MOVE * distances[name][1]}
    if len(known) < _LEAST_ANSWERS:
        middle = median_low(known.values())  # of two, the larger one is compared with the smaller
        return {
            name: f"The update is {norm:.3g} away from the global model, more than {_FIXED_FACTOR:g} times the "
            f"{middle:.3g} that are the median of the round's {len(known)}."
            for name, norm in far.items()
            if norm > _FIXED_FACTOR * middle
        }
    logarithms = {name: math.log10(norm) for name, norm in known.items()}
    middle = median(logarithms.values())
    spread = max(median(abs(value - middle) for value in logarithms.values()), _LEAST_SPREAD)
    scores = {name: _NORMAL * (logarithms[name] - middle) / spread for name in far}
    return {
        name: f"The update is {known[name]:.3g} away from the global model, the median of the round's {len(known)} is "
        f"{10**middle:.3g}: its score is {score:.1f}, and [gate] outlier_score is {limit:g}."
        for name, score in scores.items()
        if score > limit
    }
