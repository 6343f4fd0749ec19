"""What must hold of the records of a job, in every state and from each to the next."""

from collections.abc import Iterator

from coordinator.protocol import RUNNING, Protocol, Records, Update
from coordinator.states import OWING, PartState, RoundState

WAITING, ACCEPTED, DROPPED, LATE, KEPT = (
    PartState.WAITING,
    PartState.ACCEPTED,
    PartState.DROPPED,
    PartState.LATE,
    PartState.KEPT,
)
OPEN, AGGREGATING, CLOSED = RoundState.OPEN, RoundState.AGGREGATING, RoundState.CLOSED
REFUSED = frozenset({PartState.QUARANTINED, PartState.DECLINED, PartState.FAILED})
VERDICTS = REFUSED | {ACCEPTED}
CHANGES = {
    WAITING: VERDICTS | {LATE, DROPPED},
    LATE: REFUSED | {KEPT, DROPPED},
    KEPT: frozenset({ACCEPTED, DROPPED}),
}


def wrong(protocol: Protocol, db: Records) -> Iterator[str]:
    """Say what must not be in the records."""
    used = [update for round_ in db.rounds for update in round_.used]
    if len(used) != len(set(used)):
        yield "an update counts twice"
    for number, round_ in enumerate(db.rounds, start=1):
        parts = [part for part in round_.parts if part is not None]
        if round_.closings > 1:
            yield f"two results of round {number} were recorded"
        if len(parts) < protocol.quorum:
            yield f"round {number} asks fewer sites than a quorum"
        if round_.state is CLOSED and len(round_.used) < protocol.quorum:
            yield f"round {number} was closed without a quorum"
        if round_.state is not OPEN and any(part.state is WAITING for part in parts):
            yield f"round {number} does not wait for who it waits for"
        if round_.state is not CLOSED and (number < len(db.rounds) or db.job == "completed"):
            yield f"the job went on without round {number}"
    for of, part in db.parts():
        home = part.counted_in or of.number
        if part.state is ACCEPTED and db.round(home).state is CLOSED and of not in db.round(home).used:
            yield f"{of} was accepted and is lost"
        if any(of in round_.used for round_ in db.rounds) and (
            part.state is not ACCEPTED or of not in db.round(home).used
        ):
            yield f"{of} counts and should not"
        if part.state in (WAITING, LATE, KEPT) and db.job != RUNNING:
            yield f"{of} is still {part.state}, and the job has ended"


def wrong_step(protocol: Protocol, before: Records, after: Records) -> Iterator[str]:
    """Say what must not change in one step."""
    if before.job not in (RUNNING, after.job):
        yield "a job ended twice"
    for number, (old, new) in enumerate(zip(before.rounds, after.rounds, strict=False), start=1):
        ended = old.state not in (OPEN, AGGREGATING)
        if (ended and (old.state, old.used) != (new.state, new.used)) or (
            old.state is AGGREGATING and new.state is OPEN
        ):
            yield f"round {number} went from {old.state} to {new.state}"
    for of, old_part in before.parts():
        part = after.part(of)
        if part.state is not old_part.state:
            yield from _wrong_change(protocol, before, after, of)
        elif part != old_part and (part.state not in OWING or part.attempt != old_part.attempt + 1):
            yield f"{of} changed from {old_part} to {part}"


def _wrong_change(protocol: Protocol, before: Records, after: Records, of: Update) -> Iterator[str]:
    old, new, was_open = before.part(of).state, after.part(of).state, before.round(of.number).state is OPEN
    allowed = CHANGES.get(old, frozenset())
    if old is DROPPED and was_open and protocol.late != "drop":
        allowed = VERDICTS
    if new not in allowed:
        yield f"{of} went from {old} to {new}"
    if old is WAITING and not was_open:
        yield f"{of} was answered after its round"
    if (
        old is KEPT
        and new is DROPPED
        and after.job == RUNNING
        and of.number >= len(after.rounds) - protocol.max_staleness
    ):
        yield f"{of} was kept and is lost"
