"""Every state that the protocol can reach within some bounds is visited; in none of them is anything wrong.

Bounds: two sites, one or two rounds, one or two coordinator processes, one or two faults. A message that can change
nothing any more is forgotten, and two processes that have changed places are the same.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest

from coordinator.protocol import RUNNING, Protocol, Records, Update
from coordinator.states import OWING, PartState, RoundState
from coordinator.world import Hand, Machine, Message, World
from tests.protocol_facts import wrong, wrong_step

WAITING, ACCEPTED, FAILED, DROPPED = PartState.WAITING, PartState.ACCEPTED, PartState.FAILED, PartState.DROPPED
LATE, KEPT = PartState.LATE, PartState.KEPT
OPEN, AGGREGATING, CLOSED = RoundState.OPEN, RoundState.AGGREGATING, RoundState.CLOSED


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a visit of all states has found, or of those before the first in which something is wrong."""

    states: int = 0
    ends: frozenset[str] = frozenset()  # how jobs have ended
    problem: tuple[str, ...] = ()  # what is wrong, and the steps that lead to it; none of the ways is shorter


def visit(machine: Machine, *, processes: int, faults: int, without: str = "") -> Found:
    """Visit every state, breadth first; `without` names a step that the coordinator does not take."""
    first = tidy(machine.begin(processes=processes, faults=faults))
    numbers = {first: 0}  # of the worlds, in the order in which they were found
    came: list[tuple[int, str]] = [(0, "")]  # from which other one, and how
    followers: list[list[int]] = []
    looked: set[tuple[Records, Records]] = set()  # many worlds have the same records
    ends: set[str] = set()
    todo = [first]
    for number, world in enumerate(todo):
        before, reached, goes_on = world.records, [], False
        for name, after in machine.steps(world):
            if name == without:
                continue
            goes_on = goes_on or not name.startswith(("site: ", "fault: "))
            if after.records is not before and (step := (before, after.records)) not in looked:
                looked.add(step)
                for problem in (*wrong_step(machine.protocol, *step), *wrong(machine.protocol, after.records)):
                    return Found(states=len(todo), problem=(problem, *trace(came, number), name))
            after = tidy(after)
            if after not in numbers:
                numbers[after] = len(todo)
                todo.append(after)
                came.append((number, name))
            reached.append(numbers[after])
        followers.append(reached)
        if before.job != RUNNING:
            ends.add(before.job)
        elif not goes_on:
            return Found(states=len(todo), problem=("the job is stuck", *trace(came, number)))
    if (turns := in_a_circle(followers)) is not None:
        return Found(states=len(todo), problem=("the job goes round and round", *trace(came, turns)))
    return Found(states=len(todo), ends=frozenset(ends))


def in_a_circle(followers: list[list[int]]) -> int | None:
    """Return a state that can be reached from itself; None if every run is finite."""
    waiting = [0] * len(followers)
    for reached in followers:
        for each in reached:
            waiting[each] += 1
    free = [number for number, count in enumerate(waiting) if count == 0]
    for number in free:
        for each in followers[number]:
            waiting[each] -= 1
            if waiting[each] == 0:
                free.append(each)
    return next((number for number, count in enumerate(waiting) if count > 0), None)


def trace(came: list[tuple[int, str]], number: int) -> list[str]:
    """Return the steps that lead to the state."""
    names: list[str] = []
    while number:
        number, name = came[number]
        names.append(name)
    return names[::-1]


def tidy(world: World) -> World:
    """Return the same world without what makes no difference."""
    db = world.records
    if db.job != RUNNING:
        world = world._replace(messages=frozenset(), chord=None, dead=frozenset(), faults=0)
    else:
        world = world._replace(messages=frozenset(each for each in world.messages if matters(world, each)))
    if len(world.hands) == 1:
        return world
    last = db.rounds[-1]
    owner = last.owner if world.is_held else None
    if order(world.hands[0], owner == 0) < order(world.hands[1], owner == 1):
        world = world._replace(hands=world.hands[::-1])
        owner = None if owner is None else 1 - owner
    if owner != last.owner:
        world = world._replace(records=db.with_round(len(db.rounds), last._replace(owner=owner)))
    return world


def matters(world: World, message: Message) -> bool:
    """Return whether the message may still change something."""
    db, number = world.records, len(world.records.rounds)
    if message.kind == "callback":
        return message.number == number
    if message.kind == "question" and message.site in world.dead:
        return False
    state, is_open = db.part(Update(message.number, message.site)).state, db.round(message.number).state is OPEN
    return state in OWING or (is_open and (world.chord is not None or state is DROPPED))


@lru_cache(100_000)
def order(hand: Hand | None, owns: bool) -> tuple[bool, str, bool]:
    """Return what two processes are sorted by."""
    return hand is not None, repr(hand), owns


# The numbers of states are pinned, so that what is visited becomes neither less nor more without anybody's notice.
@pytest.mark.parametrize(
    ("rules", "most_attempts", "processes", "faults", "states"),
    [
        ({}, 2, 2, 1, 9045),
        ({"quorum": 2}, 2, 1, 1, 2986),
        ({"late": "drop", "target": 1}, 1, 1, 2, 9220),
        ({"late": "keep", "target": 1, "num_rounds": 2}, 2, 2, 0, 9441),
        ({"late": "keep", "target": 1, "num_rounds": 2, "max_staleness": 1}, 1, 1, 1, 9221),
        ({"late": "keep", "quorum": 2, "num_rounds": 2}, 1, 1, 1, 4440),
    ],
)
def test_nothing_is_lost_and_no_job_is_stuck(
    rules: dict[str, Any], most_attempts: int, processes: int, faults: int, states: int
) -> None:
    """In every state the records are right, and unless the job has ended there is a step that must come.

    No run is infinite. So each run ends, and ends the job, in whatever order it goes on, whether or not sites answer.
    """
    machine = Machine(protocol=Protocol(**rules), most_attempts=most_attempts)
    found = visit(machine, processes=processes, faults=faults)
    assert found.problem == ()
    assert found.ends == ({"completed", "failed", "aborted"} if faults else {"completed", "failed"})
    assert found.states == states


class AnswersWithoutComparing(Protocol):
    def answer(self, db: Records, of: Update, attempt: int, seen: PartState, verdict: PartState) -> Records:
        return super().answer(db, of, attempt, db.part(of).state, verdict)


class ClaimsTooEarly(Protocol):
    def claim(self, db: Records, number: int, owner: int) -> Records:
        held = db.round(number)._replace(state=AGGREGATING, owner=owner, leased=True)
        return db.with_round(number, held) if db.round(number).state is OPEN else super().claim(db, number, owner)


class ClosesWithoutComparing(Protocol):
    def close(self, db: Records, number: int, owner: int, updates: tuple[Update, ...]) -> Records:
        held = db.round(number)._replace(state=AGGREGATING, owner=owner)
        return super().close(db.with_round(number, held), number, owner, updates)


class CountsAfterReading(Protocol):
    def count_kept(self, db: Records, number: int) -> Records:
        return db

    def close(self, db: Records, number: int, owner: int, updates: tuple[Update, ...]) -> Records:
        return super().close(super().count_kept(db, number), number, owner, updates)


class CountsItsOwnAsLate(Protocol):
    """An update that misses its round, and comes before the round is claimed, is both its own and a late one."""

    def count_kept(self, db: Records, number: int) -> Records:
        for of, part in list(db.parts()):
            if part.state is KEPT:
                db = db.with_part(of, part._replace(state=ACCEPTED, counted_in=number))
        return db


class AsksNobodyWhoIsBusy(Protocol):
    def plan(self, db: Records) -> Records:
        busy = {of.site for of, part in db.parts() if part.state is LATE}
        planned = super().plan(db._replace(members=db.members - busy))
        return planned._replace(members=db.members)


class LeavesPartsBehind(Protocol):
    def abort(self, db: Records) -> Records:
        return db._replace(job="aborted")


KEEP: dict[str, Any] = {"late": "keep", "num_rounds": 2}


@pytest.mark.parametrize(
    ("protocol", "processes", "faults", "problem"),
    [
        (AnswersWithoutComparing(late="drop"), 1, 0, "went from dropped to accepted"),
        (ClaimsTooEarly(), 1, 1, "does not wait for who it waits for"),
        (ClosesWithoutComparing(), 2, 1, "a job ended twice"),
        (CountsAfterReading(target=1, **KEEP), 1, 0, "was accepted and is lost"),
        (CountsItsOwnAsLate(target=1, **KEEP), 1, 0, "an update counts twice"),
        (AsksNobodyWhoIsBusy(**KEEP), 1, 1, "asks fewer sites than a quorum"),
        (LeavesPartsBehind(), 1, 1, "the job has ended"),
    ],
)
def test_a_fault_in_a_transaction_is_found(protocol: Protocol, processes: int, faults: int, problem: str) -> None:
    found = visit(Machine(protocol=protocol), processes=processes, faults=faults)
    print("\n".join(found.problem))  # the trace, for who reads what pytest captures
    assert problem in found.problem[0]
    assert len(found.problem) > 1


@pytest.mark.parametrize("without", ["sweep: expire", "sweep: call back", "sweep: end lease"])
def test_a_sweeper_that_leaves_out_a_step_leaves_a_job_stuck(without: str) -> None:
    found = visit(Machine(protocol=Protocol()), processes=1, faults=1, without=without)
    assert found.problem[0] == "the job is stuck"


def test_without_the_sweeper_a_round_that_was_not_sent_ends_at_its_deadline_with_nothing() -> None:
    assert visit(Machine(protocol=Protocol()), processes=1, faults=0, without="sweep: send").ends == {"failed"}


def test_the_shortest_way_to_a_fault_is_told() -> None:
    found = visit(Machine(protocol=AnswersWithoutComparing(late="drop")), processes=1, faults=0)
    assert "went from dropped to accepted" in found.problem[0]
    assert found.problem[1:3] == ("sweep: send", "send")
    assert sorted(found.problem[3:-1]) == ["look at an answer", "mark", "site: answer", "sweep: expire"]
    assert found.problem[-1] == "record"
