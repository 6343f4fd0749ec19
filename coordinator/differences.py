"""Say in which tensors two models differ, piece by piece, to the bit."""

from collections.abc import Iterator

import numpy as np

from store.blobs import BlobStore
from store.index import Weights
from store.pieces import WeightsReader
from store.tensors import numpy_dtype

_COMPARED_ELEMENTS = 256 * 1024  # at a time
_MOST_TOLD = 5  # tensors


def differences(store: BlobStore, stored: Weights, beside: BlobStore, made: Weights) -> Iterator[str]:
    """Say in which tensors the two models differ."""
    if stored.schema != made.schema:
        names = sorted(
            name for name in {*stored.schema, *made.schema} if stored.schema.get(name) != made.schema.get(name)
        )
        yield f"Names, shapes or dtypes differ: {', '.join(names[:_MOST_TOLD])} ({len(names)} tensors)."
        return
    differing = 0
    with WeightsReader(store, stored) as old, WeightsReader(beside, made) as new:
        for name in stored.schema:
            if said := _difference(name, old, new, stored):
                differing += 1
                if differing <= _MOST_TOLD:
                    yield said
    yield (
        f"{differing} of {len(stored.schema)} tensors differ."
        if differing
        else "The tensors are equal; the files differ."
    )


def _difference(name: str, old: WeightsReader, new: WeightsReader, weights: Weights) -> str:
    """Return how many elements of the tensor differ, and the first of them; empty if none does."""
    spec = weights.schema[name]
    dtype = numpy_dtype(spec.dtype)
    count, first = 0, ""
    for start in range(0, spec.num_elements, _COMPARED_ELEMENTS):
        size = min(_COMPARED_ELEMENTS, spec.num_elements - start)
        pieces = np.empty((2, size), dtype)
        old.read(name, start, pieces[0])
        new.read(name, start, pieces[1])
        raw = pieces.view(np.uint8).reshape(2, size, dtype.itemsize)
        differ = np.flatnonzero((raw[0] != raw[1]).any(axis=1))  # bits, since NaN and -0.0 are equal to what they are
        if differ.size and not first:
            at = int(differ[0])
            first = f"element {start + at} is {pieces[0, at]} in the store and {pieces[1, at]} recomputed"
        count += int(differ.size)
    return f"Tensor {name!r}: {count} of {spec.num_elements} elements differ; {first}." if count else ""
