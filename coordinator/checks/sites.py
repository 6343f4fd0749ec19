"""Look at every enrolled site, by what its heartbeat tells."""

import time
from collections.abc import Iterator
from importlib.metadata import version

from common.errors import Unavailable
from common.heartbeats import Heartbeat
from common.settings import Settings
from coordinator.checks.finding import Finding, fault, ok, warning
from coordinator.checks.roster import read_roster
from store.parties import PartyInfo

_LITTLE_BYTES = 10**9  # of disk or memory


def check_sites(settings: Settings) -> Iterator[Finding]:
    """Look at each site, and at all of them together."""
    try:
        roster = read_roster(settings)
    except Unavailable as error:
        yield warning("sites", f"Not looked at: {error.message}")
        return
    enabled = [party.site for party in roster.parties if party.enabled]
    alive = [site for site in enabled if site in roster.heartbeats]
    said = f"{len(roster.parties)} are enrolled, {len(enabled)} of them enabled, {len(alive)} of these alive."
    if not roster.parties:
        yield warning("sites", "None is enrolled.", "Enroll one: `fedchord sites add NAME`.")
    elif not alive:
        yield fault("sites", said, "Have at least one enabled site's worker started; no job can run.")
    else:
        yield ok("sites", said)
    for party in roster.parties:
        yield judge_site(party, roster.heartbeats.get(party.site or ""), here=version("fedchord"), now=time.time())


def judge_site(party: PartyInfo, heartbeat: Heartbeat | None, *, here: str, now: float) -> Finding:
    """Tell how one site is; `here` is this installation's version, `now` the unix time in seconds."""
    name = f"site {party.site}"
    disabled = f" It is disabled{f' ({party.reason})' if party.reason else ''}." if not party.enabled else ""
    if heartbeat is None:
        if disabled:
            return ok(name, f"No heartbeat.{disabled}")
        return warning(
            name,
            "No heartbeat: its worker does not run, or does not reach the broker.",
            f"Have it started, and its log read; or leave it out: `fedchord sites disable {party.site}`.",
        )
    trainers = ", ".join(heartbeat.trainers) or "none"
    said = (
        f"Alive, heartbeat {max(0.0, now - heartbeat.at):.1f} s old, FedChord {heartbeat.version}, "
        f"{heartbeat.free_slots} of {heartbeat.slots} slots free, trainers: {trainers}.{disabled}"
    )
    if _major(heartbeat.version) != _major(here) and "" not in (_major(heartbeat.version), _major(here)):
        return fault(name, said, f"Its FedChord does not go with {here} here: install the same at both.")
    if not heartbeat.trainers:
        return warning(name, said, "It offers no trainer and declines every job: set site_trainers at the site.")
    if heartbeat.version != here:
        return warning(name, said, f"Here is {here}: install the same at both when no job runs.")
    if heartbeat.disk_free < _LITTLE_BYTES:
        return warning(name, said, f"It has only {heartbeat.disk_free / 1e6:.0f} MB of disk left: have space freed.")
    return ok(name, said)


def _major(number: str) -> str:
    """Return the version's first number; empty if it has none."""
    first = number.partition(".")[0]
    return first if first.isdecimal() else ""
