"""The code's transactions do to the records what the protocol says, in any order and with knowledge that is old.

Two processes read the records now and then and act on what they have read, through the code's own functions. After each
act the records are what `coordinator.protocol` makes of the same act. Real: gate, deadlines, claims, closing, planning,
leaving, aborting. Left out: broker and object store, which decide nothing here.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from sqlalchemy import Connection, Engine, select

from common.errors import Conflict, NotFound
from coordinator import closing, gate, membership, submitting, waiting
from coordinator.jobfile import JobSpec
from coordinator.jobs import Job, add_job, get_job, new_job
from coordinator.overdue import Overdue, find_overdue
from coordinator.parts import Part, count_kept, find_carried, find_parts, raise_attempt
from coordinator.planning import Step, plan_next
from coordinator.protocol import RUNNING, Protocol, Records, Update
from coordinator.protocol import Part as ModelPart
from coordinator.protocol import Round as ModelRound
from coordinator.rounds import Round, claim_round, end_lease, find_rounds, forgive_claim, renew_lease
from coordinator.services import Services
from coordinator.states import PartState, RoundKind, RoundState
from coordinator.steady_clock import SteadyClock
from coordinator.waiting import Waiting, end_waiting, find_waiting
from store.database import reading, writing
from store.parties import enroll_site
from store.tables import rounds as rounds_table
from store.tables import utc_now
from tests.federation import heartbeat
from tests.protocol_facts import wrong, wrong_step

SITES = ("a", "b", "c")
LEASE_SECONDS = 3600.0  # none runs out by itself: what ends it is what the sweeper does
ALIVE = {site: heartbeat(("t",)) for site in SITES}

processes = st.integers(0, 1)
sites = st.integers(0, len(SITES) - 1)
ages = st.sampled_from([0, 0, 0, 1, 1, 2])  # of a round: 0 is the newest
anew = st.sampled_from(
    [True, False, False]
)  # whether a process reads before it acts, or knows what it read some time ago
verdicts = st.sampled_from([PartState.ACCEPTED, PartState.ACCEPTED, PartState.QUARANTINED])


ACTS = (  # some more often than others
    *(6 * ["answer"]),
    *(4 * ["expire"]),
    *(3 * ["claim", "end lease"]),
    *(2 * ["look", "answer late", "ask again", "miss heartbeats", "read", "close", "renew"]),
    *("go on", "settle", "forgive", "leave", "abort", "plan again"),
)


class Clock(SteadyClock):
    """What the sweeper believes of time, as the test says."""

    def __init__(self, *, passed: bool) -> None:
        super().__init__()
        self._passed = passed

    def has_passed(self, name: Any, at: Any, *, begun: Any) -> bool:
        return self._passed

    def seconds(self, name: Any) -> float:
        return 1e9


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What a process has read of the records, and the records of the protocol at that moment."""

    job: Job
    rounds: tuple[Round, ...]
    parts: tuple[dict[str, Part], ...]  # by round and site
    overdue: Overdue
    waiting: dict[str, Waiting]  # by round
    renewals: int
    model: Records


@dataclass(frozen=True, kw_only=True)
class Held:
    """A round that a process has claimed, and what it has read of it."""

    number: int
    owner: int
    known: tuple[Round, list[Part], list[Part]] | None = None
    updates: tuple[Update, ...] = ()


class RoundMachine(RuleBasedStateMachine):
    """Do the same to the records and to the protocol's."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.services: Services = SimpleNamespace(  # type: ignore[assignment]
            engine=engine,
            settings=SimpleNamespace(choosers={}, reference_seconds=60),
            broker=SimpleNamespace(set=lambda *_, **__: None),
        )

    @initialize(
        rounds=st.sampled_from([6, 4, 3, 2, 1]),
        quorum=st.integers(1, 2),
        enough=st.none() | st.integers(1, 2),
        late=st.sampled_from(["keep", "keep", "count", "drop"]),
        max_staleness=st.integers(1, 2),
    )
    def begin(self, rounds: int, quorum: int, enough: int | None, late: str, max_staleness: int) -> None:
        target = None if enough is None else max(enough, quorum)
        spec = JobSpec.model_validate(
            {
                "name": "protocol",
                "trainer": "t",
                "rounds": rounds,
                "test_every": 0,
                "min_sites": quorum,
                "participation": {} if target is None else {"target_sites": target},
                "late": {"policy": late, "max_staleness": max_staleness},
            }
        )
        self.protocol = Protocol(
            num_sites=len(SITES),
            num_rounds=rounds,
            quorum=quorum,
            target=target,
            late=late,
            max_staleness=max_staleness,
        )
        with writing(self.engine) as connection:
            for site in SITES:
                enroll_site(connection, site, f"key of {site}")
            job = add_job(connection, new_job(spec, sites=SITES, model_id="first", submitted_by=""))
            plan_next(connection, job, Step(kind=RoundKind.START, number=0), alive=ALIVE)
        self.job_id = job.job_id
        self.db = self.protocol.plan(Records((), frozenset(range(len(SITES)))))
        self.owners = 0
        self.renewals = 0
        self.held: list[Held | None] = [None, None]
        self.known = [self.read(), self.read()]
        self.compare()

    def teardown(self) -> None:
        with suppress(Conflict):  # so that the next example's sweeper has nothing to do for this one's job
            submitting.abort(self.services, self.job_id, "the example is over")

    # One rule, not one for each: of many, Hypothesis leaves most out of an example, and then nothing happens in it.
    @rule(
        what=st.sampled_from(ACTS),
        process=processes,
        anew=anew,
        site=sites,
        age=ages,
        which=st.integers(0, 8),
        back=st.sampled_from([0, 0, 1, -1]),
        some=st.sets(sites, min_size=1),
        verdict=verdicts,
    )
    def act(
        self,
        what: str,
        process: int,
        anew: bool,
        site: int,
        age: int,
        which: int,
        back: int,
        some: set[int],
        verdict: PartState,
    ) -> None:
        acts: dict[str, Callable[[], None]] = {
            "look": lambda: self.look(process),
            "answer": lambda: self.answer(process, anew, which, back, verdict),
            "answer late": lambda: self.answer_late(process, anew, verdict),
            "ask again": lambda: self.ask_again(process, anew, site, age),
            "expire": lambda: self.expire(process, anew, age),
            "miss heartbeats": lambda: self.miss_heartbeats(process, anew, some),
            "claim": lambda: self.claim(process),
            "read": lambda: self.read_updates(process),
            "close": lambda: self.close(process),
            "renew": lambda: self.renew(process),
            "forgive": lambda: self.forgive(process),
            "end lease": lambda: self.end_a_lease(process, anew),
            "settle": lambda: self.settle(process),
            "go on": lambda: self.go_on(process, some),
            "leave": lambda: self.leave(site),
            "abort": lambda: self.abort(),
            "plan again": lambda: self.plan_what_is_planned(process),
        }
        if what in ("claim", "settle", "go on") and self.protocol.count_good(self.db) < self.protocol.quorum and which:
            return  # else most examples would end early, with a job that has failed
        acts[what]()

    # ---- what a process reads, and what it does by that

    def look(self, process: int) -> None:
        self.known[process] = self.read()

    def answer(self, process: int, anew: bool, which: int, attempts_ago: int, verdict: PartState) -> None:
        known = self.knowledge(process, anew)
        every = [of for of, part in known.model.parts() if part.state is not PartState.ACCEPTED]
        if not every:
            return
        of = every[-1 - which % len(every)]
        given = known.model.part(of).attempt
        self.take(known, of, given + 1 if attempts_ago < 0 else max(given - attempts_ago, 1), verdict)

    def take(self, known: Knowledge, of: Update, attempt: int, verdict: PartState) -> None:
        """Take an answer, as the gate does, by what is known."""
        round_, part = known.rounds[of.number - 1], known.parts[of.number - 1][SITES[of.site]]
        is_welcome = gate._is_welcome(known.job, round_, part, attempt)
        assert is_welcome == self.protocol.is_welcome(known.model, of, attempt)
        if is_welcome:
            values = {"num_examples": 1, "reason": "" if verdict is PartState.ACCEPTED else "bad"}
            counted = gate._record(self.services, self.job, round_, replace(part, attempt=attempt), verdict, values)
            self.expect(self.protocol.answer(self.db, of, attempt, part.state, verdict), counted)

    def ask_again(self, process: int, anew: bool, site: int, age: int) -> None:
        known = self.knowledge(process, anew)
        of = Update(len(known.rounds) - age, site)
        part = known.parts[of.number - 1].get(SITES[site]) if of.number > 0 else None
        if part is not None:
            with writing(self.engine) as connection:
                raised = raise_attempt(connection, part)
            self.expect(self.protocol.raise_attempt(self.db, of, part.attempt), raised)

    def expire(self, process: int, anew: bool, age: int) -> None:
        known = self.knowledge(process, anew)
        number = len(known.rounds) - age
        if number < 1 or (each := known.waiting.get(known.rounds[number - 1].round_id)) is None:
            return
        end_waiting(self.services, replace(each, job=self.job), None, Clock(passed=True))
        after = self.db
        if each.round.state is not RoundState.OPEN:
            after = self.protocol.end_late(after, number)
        elif owing := [SITES.index(part.site) for part in each.owing if part.state is PartState.WAITING]:
            after = self.protocol.let_surplus_go(after) if number == len(after.rounds) else after
            after = self.protocol.let_go(after, number, owing)
        self.expect(after)

    def miss_heartbeats(self, process: int, anew: bool, absent: set[int]) -> None:
        known = self.knowledge(process, anew)
        number = len(known.rounds)
        each = known.waiting.get(known.rounds[-1].round_id)
        if each is None or each.round.state is not RoundState.OPEN:
            return
        there = {site: beat for at, (site, beat) in enumerate(ALIVE.items()) if at not in absent}
        end_waiting(self.services, replace(each, job=self.job), there, Clock(passed=False))
        owing = {SITES.index(part.site) for part in each.owing if part.state is PartState.WAITING}
        after = self.db
        if owing and number == len(after.rounds):
            after = self.protocol.let_surplus_go(after)
            after = self.protocol.let_absent_go(after, number, owing & absent) if owing & absent else after
        self.expect(after)

    # ---- aggregation

    def settle(self, process: int) -> None:
        self.claim(process)
        self.read_updates(process)
        self.close(process)

    def go_on(self, process: int, answering: set[int]) -> None:
        """Let some sites answer and the others miss the deadline, so that examples come to later rounds."""
        known = self.knowledge(process, True)
        for site in sorted(answering):
            if (part := known.parts[-1].get(SITES[site])) is not None:
                self.take(known, Update(len(known.rounds), site), part.attempt, PartState.ACCEPTED)
        self.expire(process, True, 0)
        self.settle(process)

    def answer_late(self, process: int, anew: bool, verdict: PartState) -> None:
        known = self.knowledge(process, anew)
        for of, part in known.model.parts():
            if part.state is PartState.LATE:
                self.take(known, of, part.attempt, verdict)

    def claim(self, process: int) -> None:
        number = len(self.db.rounds)
        self.owners += 1
        with writing(self.engine) as connection:
            claimed = claim_round(connection, self.round_id(number), str(self.owners), LEASE_SECONDS)
            if claimed:
                count_kept(connection, self.round_id(number))
        self.expect(self.protocol.claim(self.db, number, self.owners), claimed)
        if claimed:
            self.held[process] = Held(number=number, owner=self.owners)

    def read_updates(self, process: int) -> None:
        if (held := self.held[process]) is None:
            return
        round_id = self.round_id(held.number)
        with reading(self.engine) as connection:
            round_ = next(each for each in find_rounds(connection, self.job_id) if each.round_id == round_id)
            own = find_parts(connection, round_id)
            carried = find_carried(connection, self.job_id, round_id)
        good = [self.update_of(part) for part in (*own, *carried) if part.state is PartState.ACCEPTED]
        updates = self.protocol.read(self.db, held.number)
        assert sorted(good) == sorted(updates)
        self.held[process] = replace(held, known=(round_, own, carried), updates=updates)

    def close(self, process: int) -> None:
        held = self.held[process]
        if held is None or held.known is None:
            return
        round_, own, carried = held.known
        following = closing._settle(self.services, str(held.owner), self.job, round_, own, carried)
        after = self.protocol.close(self.db, held.number, held.owner, held.updates)
        assert (following is not None) == (len(after.rounds) > len(self.db.rounds))
        self.held[process] = None
        self.expect(after)

    def renew(self, process: int) -> None:
        if (held := self.held[process]) is None:
            return
        with writing(self.engine) as connection:
            renewed = renew_lease(connection, self.round_id(held.number), str(held.owner), LEASE_SECONDS)
        self.renewals += renewed
        self.expect(self.protocol.renew(self.db, held.number, held.owner))

    def forgive(self, process: int) -> None:
        if (held := self.held[process]) is None:
            return
        with writing(self.engine) as connection:
            forgiven = forgive_claim(connection, self.round_id(held.number), str(held.owner))
        self.held[process] = None
        self.expect(self.protocol.forgive(self.db, held.number, held.owner), forgiven)

    def end_a_lease(self, process: int, anew: bool) -> None:
        """End the lease that was seen; if it was renewed or taken over since, it goes on."""
        known = self.knowledge(process, anew)
        for seen in known.overdue.held:
            if seen.round_id != self.round_id(len(known.rounds)):
                continue  # of another example's job
            with writing(self.engine) as connection:
                ended = end_lease(connection, seen.round_id, seen.owner, seen.until)
            number = len(known.rounds)
            as_seen = self.db.round(number).leased and str(self.db.round(number).owner) == seen.owner
            assert ended == (as_seen and known.renewals == self.renewals)
            if ended:
                self.expect(self.protocol.end_lease(self.db, number))

    # ---- people, and repetitions

    def leave(self, site: int) -> None:
        after = self.protocol.leave(self.db, site)
        try:
            membership.leave(self.services, self.job_id, SITES[site], "it wants to")
        except (Conflict, NotFound):
            assert after == self.db
        self.expect(after)

    def abort(self) -> None:
        if len(self.db.rounds) == 1:
            return  # it would end too many examples at their beginning
        after = self.protocol.abort(self.db)
        try:
            submitting.abort(self.services, self.job_id, "enough")
        except Conflict:
            assert after == self.db
        self.expect(after)

    def plan_what_is_planned(self, process: int) -> None:
        number = len(self.db.rounds) - 1
        last = Step(kind=RoundKind.TRAIN, number=number) if number else Step(kind=RoundKind.START, number=0)
        with writing(self.engine) as connection:
            assert plan_next(connection, self.known[process].job, last, alive=ALIVE) is None
        self.expect(self.db)

    # ---- both sides

    @property
    def job(self) -> Job:
        with reading(self.engine) as connection:
            return get_job(connection, self.job_id)

    def round_id(self, number: int) -> str:
        return f"{self.job_id}.train.{number}"

    def update_of(self, part: Part) -> Update:
        return Update(int(part.round_id.rpartition(".")[2]), SITES.index(part.site))

    def knowledge(self, process: int, anew: bool) -> Knowledge:
        if anew:
            self.look(process)
        return self.known[process]

    def read(self) -> Knowledge:
        with reading(self.engine) as connection:
            rounds = tuple(find_rounds(connection, self.job_id))
            return Knowledge(
                job=get_job(connection, self.job_id),
                rounds=rounds,
                parts=tuple({part.site: part for part in find_parts(connection, round_.round_id)} for round_ in rounds),
                overdue=find_overdue(connection, grace_seconds=0),
                waiting={each.round.round_id: each for each in find_waiting(connection)},
                renewals=self.renewals,
                model=self.db,
            )

    def expect(self, after: Records, happened: bool | None = None) -> None:
        """Compare the records with what the protocol makes of them, and say whether it changed them."""
        assert happened in (None, after != self.db)
        assert [*wrong_step(self.protocol, self.db, after), *wrong(self.protocol, after)] == []
        self.db = after
        self.compare()

    def compare(self) -> None:
        with reading(self.engine) as connection:
            assert records(connection, self.job_id) == seen_by_the_database(self.db)
            due = [each for each in find_overdue(connection, grace_seconds=0).unclaimed if each.startswith(self.job_id)]
        ready = [self.round_id(at) for at, round_ in enumerate(self.db.rounds, start=1) if round_.is_ready]
        assert due == (ready if self.db.job == RUNNING else [])


def records(connection: Connection, job_id: str) -> Records:
    """Return the job's records as the protocol has them."""
    job = get_job(connection, job_id)
    found = []
    now = utc_now()
    for round_ in find_rounds(connection, job_id):
        query = select(rounds_table).where(rounds_table.c.round_id == round_.round_id)
        row = connection.execute(query).mappings().one()
        is_held = round_.state is RoundState.AGGREGATING
        by_site = {part.site: part for part in find_parts(connection, round_.round_id)}
        found.append(
            ModelRound(
                parts=tuple(_part(by_site[site]) if site in by_site else None for site in SITES),
                state=round_.state,
                owner=int(row["lease_owner"]) if is_held else None,
                leased=is_held and row["lease_until"] > now,
                claims=round_.claims,
            )
        )
    return Records(tuple(found), frozenset(SITES.index(site) for site in job.sites), str(job.state))


def seen_by_the_database(db: Records) -> Records:
    """Return the protocol's records without what the database does not hold in this form."""
    return db._replace(rounds=tuple(round_._replace(closings=0, used=()) for round_ in db.rounds))


def _part(part: Part) -> ModelPart:
    counted_in = None if part.counted_in is None else int(part.counted_in.rpartition(".")[2])
    return ModelPart(part.state, part.attempt, counted_in)


@pytest.fixture
def only_records(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take broker, heartbeats and tensors out of the functions that the machine calls."""
    for module, name in (
        (gate, "follow_up"),
        (waiting, "follow_up"),
        (waiting, "cancel_parts"),
        (closing, "cancel_parts"),
        (membership, "_tell"),
        (submitting, "send_notices"),
        (closing, "make_model"),
    ):
        monkeypatch.setattr(module, name, lambda *_, **__: None)
    monkeypatch.setattr(closing, "alive_sites", lambda *_: ALIVE)
    return


@pytest.mark.timeout(300)
def test_the_records_are_what_the_protocol_says(engine: Engine, only_records: None) -> None:
    is_sqlite = engine.dialect.name == "sqlite"
    run_state_machine_as_test(
        lambda: RoundMachine(engine),
        settings=settings(
            max_examples=120 if is_sqlite else 20,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
