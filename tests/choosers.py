"""Functions that choose whom a round asks, as an operator may write them."""

from collections.abc import Sequence

from coordinator.choosing import Candidate


def last(candidates: Sequence[Candidate], count: int, number: int, seed: int) -> list[str]:
    """Choose the last ones by name."""
    return [each.site for each in candidates][-count:]


def wrong(candidates: Sequence[Candidate], count: int, number: int, seed: int) -> list[str]:
    """Fail."""
    return [candidates[count // 0].site]
