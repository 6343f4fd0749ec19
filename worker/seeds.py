"""Make Python's and numpy's random numbers repeatable for as long as a piece of work takes."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def seeded(seed: int) -> Iterator[np.random.Generator]:
    """Seed the global generators, give one more of its own, and put the global ones back as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)  # all that the global generator takes
    try:
        yield np.random.default_rng(seed)
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
