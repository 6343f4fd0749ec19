"""Choose whom a round asks: everybody, some at random, those with most to spare, or as an operator's function says.

The choice is pure: the same job, round and candidates give the same sites, at random as well, whichever process
plans the round and however often.
"""

import importlib
import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any

from common.errors import InvalidSettings
from common.heartbeats import Heartbeat
from coordinator.jobs import Job

_CHOOSER_SECONDS = 5.0  # that a function of the operator's may take
BUILT_IN = ("all", "random", "available")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A site that a round could ask."""

    site: str
    heartbeat: Heartbeat | None  # None: it is away, and asked only because the others are too few


Chooser = Callable[[Sequence[Candidate], int, int, int], Iterable[str]]  # candidates, count, round, seed -> sites


def candidates(
    job: Job,
    *,
    enabled: Collection[str],
    alive: Mapping[str, Heartbeat],
    paused: Collection[str] = (),
    busy: Collection[str] = (),
    needed: int | None = None,
) -> tuple[Candidate, ...]:
    """Return whom the next round can ask, by name: those that are alive, not paused and not at an earlier round's part.

    If these are fewer than needed (a quorum if it is not given), the paused ones too, then the busy ones, then all that
    may come back: a queue keeps its messages, so a site that is away may still answer before the deadline. The busy
    ones are asked although their late answers count as well: a round does not wait for whom it has not asked.
    """
    members = [site for site in job.sites if site in enabled]
    here = [site for site in members if site in alive]
    free = [site for site in here if site not in busy]
    ready = [site for site in free if site not in paused]
    enough = job.quorum if needed is None else needed
    ready = next((found for found in (ready, free, here) if len(found) >= enough), members)
    return tuple(Candidate(site=site, heartbeat=alive.get(site)) for site in sorted(ready))


def choose(job: Job, number: int, found: Sequence[Candidate], choosers: Mapping[str, str]) -> tuple[str, ...]:
    """Return whom of the candidates the training round asks; raise InvalidSettings if an operator's function fails."""
    rules = job.spec.participation
    wanted = math.ceil((job.target or len(found)) * rules.over_selection - 1e-9)
    if rules.choose == "all" or len(found) <= wanted:
        return tuple(each.site for each in found)
    if rules.choose == "random":
        chance = random.Random(f"{job.spec.seed}/{number}")  # noqa: S311  # to be repeated, not to be secret
        chosen: Collection[str] = [each.site for each in chance.sample(found, wanted)]
    elif rules.choose == "available":
        chosen = [each.site for each in sorted(found, key=_spare, reverse=True)[:wanted]]
    else:
        chosen = _ask(rules.choose, load_chooser(rules.choose, choosers), found, wanted, number, job.spec.seed)
        if len(chosen) < job.quorum and job.spec.late.policy != "keep":  # with it, late updates may fill a round up
            raise InvalidSettings(
                f"The chooser {rules.choose!r} gave {len(chosen)} of {len(found)} candidates, but the quorum is "
                f"{job.quorum}; let it give as many, or lower min_sites."
            )
    return tuple(sorted(chosen))


def load_chooser(name: str, choosers: Mapping[str, str]) -> Chooser:
    """Return the function that the operator's settings give for the name; raise InvalidSettings."""
    if name not in choosers:
        known = ", ".join((*BUILT_IN, *sorted(choosers)))
        raise InvalidSettings(f"participation.choose: there is no chooser {name!r}; there are {known}.")
    module, _, function = choosers[name].partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except Exception as error:  # other people's code
        raise InvalidSettings(
            f"participation.choose: the chooser {name!r} cannot be loaded from {choosers[name]!r} "
            f"({type(error).__name__}: {error}); correct FEDCHORD_CHOOSERS."
        ) from error
    if not callable(found):
        raise InvalidSettings(f"participation.choose: {choosers[name]!r} is no function; correct FEDCHORD_CHOOSERS.")
    chooser: Chooser = found
    return chooser


def _ask(
    name: str, chooser: Chooser, found: Sequence[Candidate], count: int, number: int, seed: int
) -> tuple[str, ...]:
    """Return what the function chooses, if that can be used."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="chooser")
    try:
        chosen = pool.submit(lambda: tuple(chooser(found, count, number, seed))).result(_CHOOSER_SECONDS)
    except FutureTimeout as error:
        raise InvalidSettings(f"The chooser {name!r} took more than {_CHOOSER_SECONDS:g} s; correct it.") from error
    except Exception as error:  # other people's code
        raise InvalidSettings(f"The chooser {name!r} failed: {type(error).__name__}: {error}; correct it.") from error
    finally:
        pool.shutdown(wait=False)
    known = {each.site for each in found}
    if not chosen or len(set(chosen)) != len(chosen) or not known.issuperset(chosen):
        raise InvalidSettings(
            f"The chooser {name!r} gave {chosen!r:.200}; it must give one or more of its candidates, each once."
        )
    return chosen


def _spare(candidate: Candidate) -> tuple[bool, int, float, int]:
    """Return how much a site has to spare: more is better."""
    heartbeat = candidate.heartbeat
    if heartbeat is None:
        return False, 0, 0.0, 0
    return True, heartbeat.free_slots, -heartbeat.cpu_percent, heartbeat.memory_available
