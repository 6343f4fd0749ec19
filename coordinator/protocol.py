"""The protocol of a job's training rounds: documentation that can be run, of what each transaction does to the records.

The names are those of the code that it describes: `parts`, `rounds`, `gate`, `letting_go`, `closing`, `planning`,
`membership`. `coordinator.world` says what can happen around the records, and in which order.
`tests/unit/test_protocol.py` visits every state that can be reached within some bounds, and
`tests/contract/test_round_protocol.py` holds the code's own transactions against these. Nothing else uses it.

What is left out decides nothing here: tensors, signatures, references, starts, tests, pauses, who is alive.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from coordinator.states import OWING, PartState, RoundState

RUNNING = "running"  # a job that goes on


# Tuples, not dataclasses: a check makes them by the hundred thousand and looks each one up.
class Update(NamedTuple):
    """An update, or the part that it answers."""

    number: int  # of the round that it was asked for in
    site: int


class Part(NamedTuple):
    """One site's share of a round."""

    state: PartState = PartState.WAITING
    attempt: int = 1
    counted_in: int | None = None  # the later round that it counts in; None: its own


class Round(NamedTuple):
    """One question to many sites."""

    parts: tuple[Part | None, ...]  # by site; None: not asked
    state: RoundState = RoundState.OPEN
    published: bool = False
    owner: int | None = None  # the process that aggregates it
    leased: bool = False  # whether the owner's lease still runs
    claims: int = 0
    closings: int = 0  # how often a result was recorded
    used: tuple[Update, ...] = ()  # what its model was made of

    @property
    def is_ready(self) -> bool:
        """Return whether a process may claim it."""
        if self.state is RoundState.OPEN:
            return not any(part is not None and part.state is PartState.WAITING for part in self.parts)
        return self.state is RoundState.AGGREGATING and not self.leased


class Records(NamedTuple):
    """The database."""

    rounds: tuple[Round, ...]  # numbered from 1; only the last can be going on
    members: frozenset[int]  # the sites that are in the job
    job: str = RUNNING  # then completed, failed or aborted

    def round(self, number: int) -> Round:
        """Return the round."""
        return self.rounds[number - 1]

    def part(self, of: Update) -> Part:
        """Return the part, which there must be."""
        part = self.round(of.number).parts[of.site]
        assert part is not None
        return part

    def parts(self) -> Iterator[tuple[Update, Part]]:
        """Yield every part."""
        for number, round_ in enumerate(self.rounds, start=1):
            for site, part in enumerate(round_.parts):
                if part is not None:
                    yield Update(number, site), part

    def with_round(self, number: int, round_: Round) -> "Records":
        """Return the records with another round in the place of one."""
        return self._replace(rounds=(*self.rounds[: number - 1], round_, *self.rounds[number:]))

    def with_part(self, of: Update, part: Part) -> "Records":
        """Return the records with another part in the place of one."""
        parts = self.round(of.number).parts
        parts = (*parts[: of.site], part, *parts[of.site + 1 :])
        return self.with_round(of.number, self.round(of.number)._replace(parts=parts))


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The rules of a job and its transactions: each gives the records after it, the same ones if it came too late."""

    num_sites: int = 2
    num_rounds: int = 1
    quorum: int = 1
    target: int | None = None  # a round is full with so many updates, or all members', but with no less than a quorum
    late: str = "count"  # drop, count or keep
    max_staleness: int = 5
    most_claims: int = 10

    def is_welcome(self, db: Records, of: Update, attempt: int) -> bool:
        """Return whether an answer is looked at, which takes a while, before its verdict is recorded."""
        state, is_open = db.part(of).state, db.round(of.number).state is RoundState.OPEN
        if attempt > db.part(of).attempt or db.job != RUNNING:
            return False
        if state is PartState.DROPPED:
            return is_open and self.late != "drop" and of.site in db.members
        return state is PartState.LATE or (state is PartState.WAITING and is_open)

    def answer(self, db: Records, of: Update, attempt: int, seen: PartState, verdict: PartState) -> Records:
        """Record the verdict on an answer, if its part is as it was seen and, unless it is late, its round is open."""
        part, is_open = db.part(of), db.round(of.number).state is RoundState.OPEN
        if part.state is not seen or attempt > part.attempt or not (is_open or seen is PartState.LATE):
            return db
        if seen is PartState.LATE and verdict is PartState.ACCEPTED:
            verdict = PartState.KEPT
        db = db.with_part(of, part._replace(state=verdict, attempt=attempt))
        return self.let_surplus_go(db) if verdict in (PartState.ACCEPTED, PartState.KEPT) else db

    def raise_attempt(self, db: Records, of: Update, attempt: int) -> Records:
        """Give the part its next attempt, if its attempt is the known one and it owes an answer."""
        part = db.part(of)
        is_so = part.attempt == attempt and part.state in OWING
        return db.with_part(of, part._replace(attempt=attempt + 1)) if is_so else db

    def let_go(self, db: Records, number: int, sites: Iterable[int]) -> Records:
        """Wait no longer for the sites; their answers may count later if the job keeps them and a round is left."""
        if db.round(number).state is not RoundState.OPEN:
            return db
        state = PartState.LATE if self.late == "keep" and number < self.num_rounds else PartState.DROPPED
        return self._leave(db, [Update(number, site) for site in sites], PartState.WAITING, state)

    def let_surplus_go(self, db: Records) -> Records:
        """Close the newest round to who is missing if it is full."""
        is_full = self.target is not None and self.count_good(db) >= max(min(self.target, len(db.members)), self.quorum)
        return self.let_go(db, len(db.rounds), range(self.num_sites)) if is_full else db

    def count_good(self, db: Records) -> int:
        """Return how many updates there are for the newest round."""
        states = [part.state for of, part in db.parts() if of.number == len(db.rounds) or part.state is PartState.KEPT]
        return states.count(PartState.ACCEPTED) + states.count(PartState.KEPT)

    def claim(self, db: Records, number: int, owner: int) -> Records:
        """Lease a round with no answer missing, or with a lease that has run out; what is kept counts in it."""
        round_ = db.round(number)
        if not round_.is_ready:
            return db
        held = round_._replace(state=RoundState.AGGREGATING, owner=owner, leased=True, claims=round_.claims + 1)
        return self.count_kept(db.with_round(number, held), number)

    def count_kept(self, db: Records, number: int) -> Records:
        """Let every answer that is kept count in the round; one that had missed this very round is its own again."""
        for of, part in list(db.parts()):
            if part.state is PartState.KEPT:
                later = None if of.number == number else number
                db = db.with_part(of, part._replace(state=PartState.ACCEPTED, counted_in=later))
        return db

    def read(self, db: Records, number: int) -> tuple[Update, ...]:
        """Return the updates that count in the round: its own, and those of earlier rounds."""
        good = [(of, part) for of, part in db.parts() if part.state is PartState.ACCEPTED]
        own = [of for of, part in good if of.number == number]
        return (*own, *(of for of, part in good if part.counted_in == number))

    def renew(self, db: Records, number: int, owner: int) -> Records:
        """Prolong the owner's lease, or take it up again if nobody else has."""
        round_ = db.round(number)
        is_held = round_.state is RoundState.AGGREGATING and round_.owner == owner
        return db.with_round(number, round_._replace(leased=True)) if is_held else db

    def forgive(self, db: Records, number: int, owner: int) -> Records:
        """Do not count the owner's claim; the lease runs out."""
        round_ = db.round(number)
        is_held = round_.state is RoundState.AGGREGATING and round_.owner == owner
        return db.with_round(number, round_._replace(claims=round_.claims - 1)) if is_held else db

    def end_lease(self, db: Records, number: int) -> Records:
        """End the lease of an owner who does not renew it any more."""
        return db.with_round(number, db.round(number)._replace(leased=False))

    def close(self, db: Records, number: int, owner: int, updates: tuple[Update, ...]) -> Records:
        """Record the result of a round, and what follows from it, if the owner still holds it."""
        round_ = db.round(number)
        if round_.state is not RoundState.AGGREGATING or round_.owner != owner:
            return db
        ended = round_._replace(owner=None, leased=False, closings=round_.closings + 1)
        if len(updates) < self.quorum or round_.claims > self.most_claims:
            return self.end(db.with_round(number, ended._replace(state=RoundState.FAILED)), "failed")
        closed = ended._replace(state=RoundState.CLOSED, used=tuple(sorted(updates)))
        return self.plan(self.let_stale_go(db.with_round(number, closed), number))

    def let_stale_go(self, db: Records, number: int) -> Records:
        """Drop what can count in no round after this one."""
        oldest = number + 1 - (0 if number >= self.num_rounds else self.max_staleness)
        return self._drop_unused(db, [of for of, _ in db.parts() if of.number < oldest])

    def plan(self, db: Records) -> Records:
        """Add the next round, or end the job; sites that are at an earlier round's part are asked only if needed."""
        if len(db.rounds) >= self.num_rounds:
            return self.end(db, "completed")
        free = db.members - {of.site for of, part in db.parts() if part.state is PartState.LATE}
        asked = free if len(free) >= self.quorum else db.members
        parts = tuple(Part() if site in asked else None for site in range(self.num_sites))
        return db._replace(rounds=(*db.rounds, Round(parts)))

    def leave(self, db: Records, site: int) -> Records:
        """Take the site out of the job, unless it could have no quorum then; the site owes nothing any more."""
        if site not in db.members or len(db.members) <= self.quorum or db.job != RUNNING:
            return db
        its = [Update(number, site) for number in range(1, len(db.rounds) + 1)]
        for state in OWING:
            db = self._leave(db, its, state, PartState.DROPPED)
        return db._replace(members=db.members - {site})

    def let_absent_go(self, db: Records, number: int, gone: Collection[int]) -> Records:
        """Wait no longer for sites that are not there, if the others can still be a quorum."""
        missing = {of.site for of, part in db.parts() if of.number == number and part.state is PartState.WAITING}
        possible = self.count_good(db) + len(missing.difference(gone))
        return self.let_go(db, number, gone) if possible >= self.quorum else db

    def end_late(self, db: Records, number: int) -> Records:
        """Drop the late answers of a round that has ended: there has been time for them."""
        if db.round(number).state is RoundState.OPEN:
            return db
        late = [Update(number, site) for site in range(self.num_sites)]
        return self._leave(db, late, PartState.LATE, PartState.DROPPED)

    def end(self, db: Records, job: str) -> Records:
        """End the job; nothing of it is late or kept any more."""
        return self._drop_unused(db, [of for of, _ in db.parts()])._replace(job=job)

    def abort(self, db: Records) -> Records:
        """End the job because a person says so."""
        if db.job != RUNNING:
            return db
        number = len(db.rounds)
        db = self.end(db, "aborted")
        db = self._leave(db, [of for of, _ in db.parts()], PartState.WAITING, PartState.DROPPED)
        return db.with_round(number, db.round(number)._replace(state=RoundState.ABORTED, owner=None, leased=False))

    def _drop_unused(self, db: Records, whom: Iterable[Update]) -> Records:
        whom = list(whom)
        return self._leave(
            self._leave(db, whom, PartState.LATE, PartState.DROPPED), whom, PartState.KEPT, PartState.DROPPED
        )

    def _leave(self, db: Records, whom: Iterable[Update], seen: PartState, state: PartState) -> Records:
        for of in whom:
            part = db.round(of.number).parts[of.site]
            if part is not None and part.state is seen:
                db = db.with_part(of, part._replace(state=state))
        return db
