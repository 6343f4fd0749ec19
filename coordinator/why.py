"""Say in plain words what a job waits for, since when, until when, and what the operator can do.

`explain` is pure: the same facts give the same words, whoever asks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from coordinator.asked import builder
from coordinator.jobs import LIVE, JobState
from coordinator.outliers import outliers
from coordinator.owing import clock, describe_site
from coordinator.parts import Part
from coordinator.rounds import Round
from coordinator.situation import Situation, waiting
from coordinator.states import PartState, RoundKind, RoundState

_SLOW_SECONDS = 5.0  # what a coordinator worker has not done after that, beyond its sweep, it cannot do


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why a job is where it is."""

    summary: str  # one sentence
    since: datetime | None  # when that began; None if nobody knows
    until: datetime | None  # when it changes at the latest; None if it does not by itself
    details: tuple[str, ...]  # sentences, what matters most first
    actions: tuple[str, ...]  # what the operator can do; none if there is nothing to be done


def explain(situation: Situation) -> Explanation:
    """Return why the job is where it is."""
    job, round_ = situation.job, situation.round
    if job.state not in LIVE:
        return _ended(situation)
    if job.state is JobState.SUBMITTED:
        return _submitted(situation)
    if round_ is None or round_.state not in (RoundState.OPEN, RoundState.AGGREGATING):
        return _between(situation)
    if round_.state is RoundState.AGGREGATING:
        return _aggregating(situation, round_)
    if not waiting(situation.parts):
        return _answered(situation, round_)
    if round_.published_at is None:
        return _unpublished(situation, round_)
    return _open(situation, round_)


# --- a job that has ended ----------------------------------------------------------------------------------------


def _ended(situation: Situation) -> Explanation:
    job = situation.job
    actions: list[str] = []
    if job.state is JobState.COMPLETED:
        did = (
            f"all of its {job.spec.rounds} training rounds are done" if job.spec.rounds else "it asked for no training"
        )
        summary = f"Job {job.name} has ended well: {did}. It waits for nothing."
        details = [f"Its global model is {job.model_id}."] if job.model_id else []
        if job.model_id:
            actions.append(f"Fetch the model: `fedchord models get --job {job.job_id[:8]}`.")
    else:
        word = "has failed" if job.state is JobState.FAILED else "was aborted"
        summary = f"Job {job.name} {word}: {_sentence(job.reason) or 'no reason was given.'}"
        details = [_verdict(part) for part in situation.parts if part.state is not PartState.ACCEPTED]
        actions.append("Correct what the reasons name and submit the job again; its models so far are kept.")
        if job.model_id:
            actions.append(f'Go on from its last global model: `model = "{job.model_id}"` in [initial_model].')
    notice_details, notice_actions = _notices(situation)
    return Explanation(
        summary=summary,
        since=job.finished_at,
        until=None,
        details=(*details, *notice_details),
        actions=(*actions, *notice_actions),
    )


def _notices(situation: Situation) -> tuple[list[str], list[str]]:
    """Return what there is to say of notices that are not on their queues, and to do about it."""
    if situation.unsent is None:
        return [], []
    names = _names(situation.unsent.sites)
    said = f"Notices to {names} are recorded since {clock(situation.unsent.since)} and not known to have been sent"
    trouble, actions = _coordinator_trouble(situation)
    return [f"{said}{'' if trouble else '; the next sweep sends them'}.", *trouble], actions


# --- a job that goes on --------------------------------------------------------------------------------------------


def _submitted(situation: Situation) -> Explanation:
    job = situation.job
    trouble, actions = _coordinator_trouble(situation, since=job.created_at)
    return Explanation(
        summary=f"Job {job.name} is recorded and waits for a coordinator worker to plan its first round.",
        since=job.created_at,
        until=None,
        details=tuple(trouble or [f"{_worker(situation)} takes it up {_soon(situation)}."]),
        actions=(*actions, *([_abort(situation, "Or end it")] if trouble else [])),
    )


def _between(situation: Situation) -> Explanation:
    trouble, actions = _coordinator_trouble(situation)
    last = situation.round
    return Explanation(
        summary=f"Job {situation.job.name} is between two rounds.",
        since=last.closed_at if last else situation.job.started_at,
        until=None,
        details=tuple(trouble or ["Its next round is planned in the same moment; ask again."]),
        actions=(*actions, _abort(situation, "If that is still so after a minute, end it")),
    )


def _unpublished(situation: Situation, round_: Round) -> Explanation:
    trouble, actions = _coordinator_trouble(situation, since=round_.created_at)
    return Explanation(
        summary=f"{_title(situation, round_)} is planned, but its messages are not known to have been sent.",
        since=round_.created_at,
        until=round_.deadline_at,
        details=(
            *(trouble or [f"{_worker(situation)} sends them {_soon(situation)}."]),
            *_at_deadline(situation, round_),
        ),
        actions=tuple(actions),
    )


def _answered(situation: Situation, round_: Round) -> Explanation:
    last = max((part.answered_at for part in situation.parts if part.answered_at), default=round_.created_at)
    trouble, actions = _coordinator_trouble(situation, since=last)
    return Explanation(
        summary=f"{_title(situation, round_)} has every answer and waits for a coordinator worker to take it up.",
        since=last,
        until=None,
        details=(*(trouble or [f"{_worker(situation)} does so {_soon(situation)}."]), *_verdicts(situation)),
        actions=tuple(actions),
    )


def _aggregating(situation: Situation, round_: Round) -> Explanation:
    lease = situation.lease
    title = _title(situation, round_)
    since = max((part.answered_at for part in situation.parts if part.answered_at), default=round_.created_at)
    if lease is not None and lease.until > situation.now:
        details = [
            f"Process {lease.owner} holds the round's lease until {clock(lease.until)} and renews it while it works.",
            "If that process dies, the lease runs out and another coordinator worker aggregates, with the same result.",
        ]
        if situation.store_trouble:
            details.insert(0, situation.store_trouble)
        return Explanation(
            summary=f"{title} has every answer and is being aggregated.",
            since=since,
            until=lease.until,
            details=(*details, *_verdicts(situation)),
            actions=("Mend the object store: `fedchord doctor` says how.",) if situation.store_trouble else (),
        )
    ran_out = lease.until if lease else since
    trouble, actions = _coordinator_trouble(situation, since=ran_out)
    return Explanation(
        summary=f"{title} has every answer; who aggregated it has gone, or waits for a service.",
        since=ran_out,
        until=None,
        details=(
            f"The lease of process {lease.owner if lease else '(unknown)'} ran out at {clock(ran_out)}.",
            *(trouble or [f"{_worker(situation)} aggregates it again {_soon(situation)}, with the same result."]),
            *_verdicts(situation),
        ),
        actions=tuple(actions),
    )


def _open(situation: Situation, round_: Round) -> Explanation:
    owing = waiting(situation.parts)
    trouble, actions = _coordinator_trouble(
        situation, since=None if situation.now < round_.deadline_at else round_.deadline_at
    )
    details = list(trouble)
    for part in owing:
        said, advice = describe_site(situation, round_, part)
        details.append(said)
        actions += [advice] if advice and advice not in actions else []
    details += [*_verdicts(situation), *_others(situation)]
    if lost := _set_aside(situation, round_):
        details.append(lost)
        actions.append("Read what was set aside, with the reasons: `fedchord dead-letters`.")
    details += [*_when_full(situation, round_), *_at_deadline(situation, round_)]
    if _quorum_is_lost(situation, round_):
        actions.insert(0, _abort(situation, "Do not wait for the deadline: end the job"))
    else:
        actions.append(_abort(situation, "Wait, or end the job"))
    count = f"{len(owing)} of {len(situation.parts)} sites"
    return Explanation(
        summary=f"{_title(situation, round_)} waits for the answers of {count}: {_names(part.site for part in owing)}.",
        since=round_.published_at,
        until=round_.deadline_at,
        details=tuple(details),
        actions=tuple(actions),
    )


# --- what several of them say --------------------------------------------------------------------------------------


def _coordinator_trouble(situation: Situation, *, since: datetime | None = None) -> tuple[list[str], list[str]]:
    """Return why no coordinator worker takes the next step, and what to do; nothing if one is about to.

    `since` is the time from which on one should have taken it.
    """
    if situation.broker_trouble:
        return [situation.broker_trouble, "So who is alive is not known, and nothing moves until it answers."], [
            "Start the broker, or correct FEDCHORD_BROKER_URL; the job then goes on by itself."
        ]
    if not situation.workers:
        queued = f" (messages on its queue: {situation.answers_queued})" if situation.answers_queued else ""
        return [f"No coordinator worker answers{queued}."], [
            "Start one: `celery -A coordinator worker`, or `fedchord up` for the embedded stack."
        ]
    if situation.store_trouble:
        return [situation.store_trouble], ["Mend the object store: `fedchord doctor` says how."]
    patience = timedelta(seconds=3 * situation.settings.sweep_seconds + _SLOW_SECONDS)
    if since is not None and situation.now - since > patience:
        return [f"{_worker(situation)} runs, but has not taken it up since {clock(since)}."], [
            "Read the coordinator's log, and run `fedchord doctor`: a service that it needs may be away."
        ]
    return [], []


def _at_deadline(situation: Situation, round_: Round) -> list[str]:
    """Return whether the quorum can still be met, and what the deadline will do."""
    quorum = situation.job.quorum
    good = _good(situation, round_)
    owing = len(waiting(situation.parts))
    at = clock(round_.deadline_at)
    if round_.deadline_at <= situation.now:
        late = f"The deadline passed at {at}; the next sweep of a coordinator worker closes the round."
        return [late]
    if round_.kind is RoundKind.TEST:
        return [f"A test round needs no quorum: at {at} it closes with the answers that are there."]
    if good >= quorum:
        more = situation.job.spec.round_extension_seconds
        unless = f", unless they report progress then: that gives them up to {more:g} s more in all" if more else ""
        return [
            f"{good} answered well and the quorum is {quorum}: at {at} the round goes on without who is missing"
            f"{unless}."
        ]
    if _quorum_is_lost(situation, round_):
        return [
            f"{good} answered well and {owing} may, but the quorum is {quorum}: it cannot be met any more, and the job "
            f"fails when the last one answers, or at {at}."
        ]
    more = quorum - good
    return [
        f"{good} answered well and the quorum is {quorum}: {more} of the {owing} that are missing must answer by {at}, "
        "or the job fails then."
    ]


def _quorum_is_lost(situation: Situation, round_: Round) -> bool:
    awaited = sum(part.state is PartState.LATE for part in situation.late) if round_.kind is RoundKind.TRAIN else 0
    possible = _good(situation, round_) + len(waiting(situation.parts)) + awaited
    return round_.kind is not RoundKind.TEST and possible < situation.job.quorum


def _good(situation: Situation, round_: Round) -> int:
    """Return how many good answers the round has, with late ones that count in it, without those that stand out."""
    good = [part for part in situation.parts if part.state is PartState.ACCEPTED]
    if round_.kind is RoundKind.TRAIN:
        good += [part for part in situation.late if part.state is PartState.KEPT]
    return len(good) - len(outliers(situation.job, good))


def _verdicts(situation: Situation) -> list[str]:
    """Return what came of the parts that have an answer, the troubles one by one."""
    answered = [part for part in situation.parts if part.state is not PartState.WAITING]
    good = [part.site for part in answered if part.state is PartState.ACCEPTED]
    said = [_verdict(part) for part in answered if part.state is not PartState.ACCEPTED]
    found = outliers(situation.job, answered)
    said += [f"{part.site} stands out so far: {found[part.task_id]}" for part in answered if part.task_id in found]
    if situation.round is not None and (site := builder(situation.round, situation.parts)) is not None:
        said.append(f"{site} was asked to build the first model; if it does not, another site is asked.")
    return [*([f"Answered well: {_names(good)}."] if good else []), *said]


def _verdict(part: Part) -> str:
    reason = _sentence(part.reason)
    return f"{part.site} {part.state}: {reason}" if reason else f"{part.site} {part.state}."


def _others(situation: Situation) -> list[str]:
    """Return who of the job's sites is not in the round, and why."""
    asked = {part.site for part in situation.parts}
    said = [
        f"{part.site} is still at its part of round {part.round_id.rpartition('.')[2]}, which may count later."
        for part in situation.late
        if part.state is PartState.LATE
    ]
    for site, member in sorted(situation.members.items()):
        if member.has_left:
            said.append(f"{site} has left the job: {_sentence(member.reason)}")
        elif member.is_paused(situation.now) and member.paused_until is not None and site not in asked:
            said.append(f"{site} is paused until {clock(member.paused_until)}: {_sentence(member.reason)}")
    return said


def _set_aside(situation: Situation, round_: Round) -> str:
    """Return what may have become of an answer or a question that is missing; empty if nothing was set aside."""
    lost = [(letter.at, letter) for letter in situation.set_aside if letter.at and letter.at >= round_.created_at]
    if not lost:
        return ""
    at, newest = max(lost, key=lambda each: each[0])
    return (
        f"Messages were set aside since the round began, the newest at {clock(at)} from queue {newest.queue}: "
        f"{_sentence(newest.reason)}"
    )


def _when_full(situation: Situation, round_: Round) -> list[str]:
    """Return with how many updates the round ends without waiting for the others."""
    if situation.job.target is None or round_.kind is not RoundKind.TRAIN:
        return []
    good = _good(situation, round_)
    return [f"It is full with {situation.job.target} updates and has {good}: then it waits for no other."]


def _title(situation: Situation, round_: Round) -> str:
    return f"Job {situation.job.name}: {round_.title}"


def _worker(situation: Situation) -> str:
    return f"Coordinator worker {situation.workers[0]}" if situation.workers else "A coordinator worker"


def _soon(situation: Situation) -> str:
    return f"at its next sweep, within {3 * situation.settings.sweep_seconds:g} s"


def _abort(situation: Situation, words: str) -> str:
    return f"{words}: `fedchord abort {situation.job.job_id[:8]}`."


def _names(sites: Iterable[str]) -> str:
    names = sorted(sites)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _sentence(reason: str) -> str:
    reason = reason.strip()
    return reason if not reason or reason.endswith((".", "!", "?")) else f"{reason}."
