"""Hold every clock against this machine's: deadlines and presigned references compare times of different machines."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import urllib3
from redis.exceptions import RedisError
from sqlalchemy import text
from urllib3.exceptions import HTTPError

from common.broker import connect
from common.errors import FedChordError, StoreUnavailable
from common.heartbeats import read_heartbeats
from common.settings import Settings
from coordinator.checks.finding import Finding, fault, ok, warning
from coordinator.checks.roster import open_records, read_roster, sqlite_file
from store.database import reading

MOST_SECONDS = 5.0  # a reference is refused, or a deadline missed, by as much
_POLL_SECONDS = 0.05
_ANSWER_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Skew:
    """How far a clock is ahead of this machine's, in seconds; behind is negative."""

    low: float  # at least
    high: float  # at the most

    @property
    def is_fault(self) -> bool:
        """Return whether it is certainly too much."""
        return self.low > MOST_SECONDS or self.high < -MOST_SECONDS

    @property
    def nearest(self) -> float:
        """Return the least that it can be."""
        return max(self.low, min(0.0, self.high))


def check_clocks(settings: Settings) -> Iterator[Finding]:
    """Look at the clocks of broker, database, object store and sites."""
    sources: dict[str, Callable[[Settings], dict[str, Skew]]] = {"the broker": _broker, "the sites": _sites}
    if sqlite_file(settings.database_url.get_secret_value()) is None:
        sources["the database"] = _database
    if settings.blob_store == "s3":
        sources["the object store"] = _object_store
    skews: dict[str, Skew] = {}
    for source, measure in sources.items():
        try:
            skews |= measure(settings)
        except (FedChordError, RedisError) as error:
            yield warning("clocks", f"That of {source} is not known: {error}")
    yield from judge_clocks(skews)


def judge_clocks(skews: dict[str, Skew]) -> Iterable[Finding]:
    """Tell which clocks are wrong; if all the others agree against this machine, it is this machine's."""
    wrong = {whose: skew for whose, skew in skews.items() if skew.is_fault}
    if not skews:
        return []
    if not wrong:
        furthest = max((abs(skew.nearest) for skew in skews.values()), default=0.0)
        whose = ", ".join(list(skews)[:5])
        return [ok("clocks", f"This machine's and {whose} differ by {furthest:.1f} s at the most.")]
    ours = len(wrong) == len(skews) > 1 and len({skew.low > 0 for skew in wrong.values()}) == 1
    return [
        fault(
            "clocks",
            f"The clock of {whose} is {abs(skew.nearest):.1f} s {'ahead of' if skew.low > 0 else 'behind'} this "
            "machine's; deadlines and references depend on both.",
            "Every other clock differs in the same way: set this machine's by NTP." if ours else "Set it by NTP.",
        )
        for whose, skew in wrong.items()
    ]


def asked(ask: Callable[[], float], *, resolution_seconds: float = 0.0) -> Skew:
    """Return the skew of a clock that is read by asking; the answer was true at some time while we waited for it."""
    before = time.time()
    told = ask()
    after = time.time()
    return Skew(low=told - after, high=told + resolution_seconds - before)


def _broker(settings: Settings) -> dict[str, Skew]:
    with closing(connect(settings)) as client:

        def ask() -> float:
            seconds, microseconds = client.time()
            return float(seconds + microseconds / 1e6)

        return {"the broker": asked(ask)}


def _database(settings: Settings) -> dict[str, Skew]:
    with open_records(settings) as engine, reading(engine) as connection:
        query = text("SELECT extract(epoch FROM clock_timestamp())")
        return {"the database": asked(lambda: float(connection.scalar(query) or 0.0))}


def _object_store(settings: Settings) -> dict[str, Skew]:
    url = f"{'https' if settings.s3_secure else 'http'}://{settings.s3_endpoint}/"

    def ask() -> float:
        try:  # whatever it answers to a stranger, it says when
            response = urllib3.request("GET", url, timeout=_ANSWER_SECONDS, retries=False)
            return parsedate_to_datetime(response.headers["Date"]).timestamp()
        except (HTTPError, KeyError, ValueError) as error:
            raise StoreUnavailable(f"{url} does not tell the time ({error}).") from error

    return {"the object store": asked(ask, resolution_seconds=1.0)}


def _sites(settings: Settings) -> dict[str, Skew]:
    """Return the skew of each site that is alive: it wrote its newest heartbeat between two looks of ours."""
    period = settings.heartbeat_seconds
    first = read_roster(settings).heartbeats
    begun = looked = time.time()
    # if no newer one comes, because the site's period is longer, all that is known is that it was not written later
    skews = {site: Skew(low=beat.at - begun, high=math.inf) for site, beat in first.items()}
    missing = set(first)
    with closing(connect(settings)) as client:
        while missing and looked - begun < 1.5 * period:
            time.sleep(_POLL_SECONDS)
            beats, now = read_heartbeats(client, missing), time.time()
            for site in [site for site in missing if site not in beats or beats[site].at != first[site].at]:
                missing.discard(site)
                if site in beats:
                    skews[site] = Skew(low=beats[site].at - now, high=beats[site].at - looked)
            looked = now
    return {f"site {site}": skew for site, skew in sorted(skews.items())}
