"""Say of a site that owes an answer what it is at, as far as its heartbeat and its queue tell."""

from datetime import datetime, timedelta

from common.heartbeats import Heartbeat
from coordinator.asking import LONGEST_PATIENCE_SECONDS
from coordinator.parts import Part
from coordinator.rounds import Round
from coordinator.situation import Situation


def clock(moment: datetime) -> str:
    """Return the moment as people read it, in their own zone."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def describe_site(situation: Situation, round_: Round, part: Part) -> tuple[str, str]:
    """Return what the site is at, and what the operator can do about it; empty if nothing."""
    site = part.site
    party = situation.parties.get(site)
    if party is None:
        return (
            f"{site} was removed: no answer of it is accepted any more, and its part waits for the deadline.",
            f"If that was a mistake, enroll it again with its own key: `fedchord sites add {site} --public-key KEY`.",
        )
    disabled = ""
    if not party.enabled:
        why = f" ({party.reason})" if party.reason else ""
        disabled = f" It is disabled{why}, which counts from the next round on."
    if situation.broker_trouble:
        return f"{site}: what it is at is not known while the broker is away.{disabled}", ""
    heartbeat = situation.heartbeats.get(site)
    said, advice = _away(situation, round_, site) if heartbeat is None else _alive(situation, round_, part, heartbeat)
    return f"{site} {said}{disabled}", advice


def _away(situation: Situation, round_: Round, site: str) -> tuple[str, str]:
    """Tell of a site without a heartbeat; nobody records when the last one came, only what it took before."""
    queued = situation.queued.get(site, 0)
    limit = situation.job.spec.participation.absent_seconds
    waits = f" If the others are a quorum, the round waits for it {limit:g} s at the most."
    advice = f"Have the worker of {site} started, and its log read: `celery -A worker worker` at the site."
    taken_at = situation.taken_at.get(site)
    if taken_at is not None:
        return (
            f"has no heartbeat: it took a message at {clock(taken_at)} and has gone since. When its worker is started "
            f"again, it goes on with that.{waits}",
            advice,
        )
    if queued:
        asked = f" since {clock(round_.published_at)}" if round_.published_at else ""
        return f"has no heartbeat: its message waits on its queue{asked}, until its worker is started.{waits}", advice
    return (
        f"has no heartbeat, and no message waits on its queue. When its worker is started, it is asked again.{waits}",
        advice,
    )


def _alive(situation: Situation, round_: Round, part: Part, heartbeat: Heartbeat) -> tuple[str, str]:
    site = part.site
    age = max(0.0, situation.now.timestamp() - heartbeat.at)
    fresh = f"(heartbeat {age:.0f} s old)"
    latest = min(age, situation.settings.ask_again_seconds)
    if round_.published_at and (situation.now - round_.published_at).total_seconds() < latest:
        return "is alive, and was asked after its last heartbeat: the next one tells what it is at.", ""
    title = f"{situation.job.name}: {round_.title} at {site}"  # as `dispatch` describes the task
    busy = "; ".join(heartbeat.working_on)
    if title in heartbeat.working_on:
        report = situation.progress.get(part.task_id)
        far = f": {100 * report.fraction:.0f} % done, {report.text or 'at work'}" if report is not None else ""
        return f"is alive and works on this very part {fresh}{far}.", ""
    if part.task_id in heartbeat.tasks:
        at = f" At work before it: {busy}." if busy else " It begins in this moment."
        return f"is alive and has this part in hand, to be next {fresh}.{at}", ""
    queued = situation.queued.get(site, 0)
    if heartbeat.tasks or heartbeat.working_on:
        on_queue = f" (messages on its queue: {queued})" if queued else ""
        return f"is alive and busy with something else {fresh}: {busy or ', '.join(heartbeat.tasks)}{on_queue}.", ""
    if queued:
        return (
            f"is alive and idle {fresh}, but has not taken its message (messages on its queue: {queued}).",
            f"If that is still so after a minute, have the worker of {site} restarted.",
        )
    again = _asked_again(situation, round_)
    return f"is alive and idle {fresh}: the question or its answer is lost, or the answer is on its way. {again}", ""


def _asked_again(situation: Situation, round_: Round) -> str:
    if not situation.workers:
        return "A coordinator worker, once one runs, takes the answer or asks again."
    if round_.published_at is None:
        return "It is asked when the round is sent."
    seconds = situation.settings.ask_again_seconds
    at = next_asking(round_.published_at, situation.now, seconds)
    return f"It is asked again about {clock(at)}, and then ever more rarely."


def next_asking(published_at: datetime, now: datetime, ask_again_seconds: float) -> datetime:
    """Return about when an idle site is asked next: after one patience, then with pauses that double up to a limit."""
    at, pause = published_at + timedelta(seconds=ask_again_seconds), ask_again_seconds
    longest = max(ask_again_seconds, LONGEST_PATIENCE_SECONDS)
    while at < now:
        at += timedelta(seconds=pause)
        pause = min(2 * pause, longest)
    return at
