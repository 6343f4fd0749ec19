"""The world around the records of `coordinator.protocol`: processes, broker, sites and time, and all they may do.

A process can die between any two transactions; another takes its place at once. The broker may lose one message or
everything, deliver twice and in any order, and the chord may call back too soon. A site that dies stays dead: one that
only loses its work is one whose message was lost. It may answer anew whatever it is asked again; its receipts, which
make it repeat itself, are a case of that. There is a budget for all that goes wrong, so that what can be reached is
finite. A deadline may pass at any time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from coordinator.protocol import RUNNING, Protocol, Records, Update
from coordinator.states import OWING, PartState, RoundState


class Message(NamedTuple):
    """What is on its way."""

    kind: str  # question, answer or callback
    number: int  # of the round
    site: int = -1  # a callback has none
    attempt: int = 1


class Hand(NamedTuple):
    """What one process has in hand, between two transactions."""

    step: str  # the next: check, complete, read, close, send or mark
    number: int
    message: Message | None = None  # not acknowledged; it comes again if the process dies
    seen: PartState = PartState.WAITING  # of the part, when the process read it
    updates: tuple[Update, ...] = ()  # that it has read


class World(NamedTuple):
    """Everything: the records, and what can be lost."""

    records: Records
    hands: tuple[Hand | None, ...]  # of the coordinator's processes; None: idle
    messages: frozenset[Message] = frozenset()  # one that comes twice is one that stays when it is delivered
    chord: frozenset[int] | None = None  # the sites whose parts of the newest round are complete; None: lost, or fired
    dead: frozenset[int] = frozenset()  # sites
    faults: int = 0  # that may still happen

    @property
    def is_held(self) -> bool:
        """Return whether the process that has claimed the newest round is alive and at it."""
        owner = self.records.rounds[-1].owner
        hand = self.hands[owner] if owner is not None else None
        return hand is not None and hand.step in ("read", "close")

    def hold(self, process: int, hand: Hand | None) -> "World":
        """Return the world in which the process has that in hand."""
        return self._replace(hands=(*self.hands[:process], hand, *self.hands[process + 1 :]))

    def take(self, message: Message) -> "World":
        """Return the world without the message."""
        return self._replace(messages=self.messages - {message})

    def send(self, *messages: Message) -> "World":
        """Return the world with the messages."""
        return self._replace(messages=self.messages.union(messages))


Step = tuple[str, World]  # what `site: …` and `fault: …` name may never happen; everything else does, in the end


@dataclass(frozen=True, kw_only=True)
class Machine:
    """All that can happen under a protocol."""

    protocol: Protocol
    most_attempts: int = 2  # the sweeper asks ever more rarely; here, no more often than this

    def begin(self, *, processes: int, faults: int) -> World:
        """Return the world in which the first round was planned, and has still to be sent."""
        sites = frozenset(range(self.protocol.num_sites))
        return World(self.protocol.plan(Records((), sites)), (None,) * processes, faults=faults)

    def steps(self, world: World) -> Iterator[Step]:
        """Yield all that can happen next; once the job has ended, that is what processes still have in hand."""
        is_running = world.records.job == RUNNING
        for process, hand in enumerate(world.hands):
            if hand is not None:
                yield from self._go_on(world, process, hand)
            elif is_running:
                yield from self._resend(world, process)
                for message in world.messages:
                    yield from self._receive(world, process, message, world.take(message))
        if is_running:
            for message in world.messages:
                if message.kind == "question" and message.site not in world.dead:
                    yield "site: answer", world.take(message).send(message._replace(kind="answer"))
            yield from self._sweep(world)
            if world.faults:
                yield from self._fail(world, world._replace(faults=world.faults - 1))

    def _receive(self, world: World, process: int, message: Message, rest: World) -> Iterator[Step]:
        """Let a process take a message; `rest` is the world without it, or with it if it comes twice."""
        db, number = world.records, message.number
        if message.kind == "answer":
            of = Update(number, message.site)
            state = db.part(of).state
            if self.protocol.is_welcome(db, of, message.attempt):
                yield "look at an answer", rest.hold(process, Hand("check", number, message, state))
            elif db.round(number).state is RoundState.OPEN and state is not PartState.WAITING:
                yield "complete again", rest.hold(process, Hand("complete", number, message))
            else:
                yield "refuse an answer", rest
        elif message.kind == "callback":
            claimed = self.protocol.claim(db, number, process)
            if claimed == db:
                yield "refuse a callback", rest
            else:
                yield "claim", rest._replace(records=claimed).hold(process, Hand("read", number, message))

    def _go_on(self, world: World, process: int, hand: Hand) -> Iterator[Step]:
        """Let a process do the next thing that it has in hand."""
        db, number, message = world.records, hand.number, hand.message
        if hand.step == "check" and message is not None:
            for verdict in (PartState.ACCEPTED, PartState.FAILED) if world.faults else (PartState.ACCEPTED,):
                after = self.protocol.answer(db, Update(number, message.site), message.attempt, hand.seen, verdict)
                counts = after != db and hand.seen is PartState.WAITING
                told = world._replace(records=after, faults=world.faults - (verdict is PartState.FAILED))
                yield "record", told.hold(process, Hand("complete", number, message) if counts else None)
        elif hand.step == "complete" and message is not None:
            yield "complete", self._complete(world.hold(process, None), number, message.site)
        elif hand.step == "read":
            updates = self.protocol.read(db, number)
            yield "read", world.hold(process, hand._replace(step="close", updates=updates))
        elif hand.step == "close":
            after = self.protocol.close(db, number, process, hand.updates)
            closed = world._replace(records=after)
            if len(after.rounds) > len(db.rounds):
                planned = closed._replace(chord=None).hold(process, Hand("send", len(after.rounds), message))
                yield "close", planned
            else:
                yield "close", closed.hold(process, None)
        elif hand.step == "send" and db.round(number).state is RoundState.OPEN:
            parts = enumerate(db.round(number).parts)
            questions = [Message("question", number, site, part.attempt) for site, part in parts if part is not None]
            sent = world.send(*questions)._replace(chord=frozenset())
            yield "send", sent.hold(process, hand._replace(step="mark"))
        elif hand.step == "send":
            yield "send nothing", world.hold(process, None)
        else:
            marked = db.with_round(number, db.round(number)._replace(published=True))
            yield "mark", world._replace(records=marked).hold(process, None)

    def _complete(self, world: World, number: int, site: int) -> World:
        """Complete a part in the chord; the last one sends the callback."""
        if world.chord is None or number != len(world.records.rounds):
            return world
        done = world.chord | {site}
        if any(part is not None and site not in done for site, part in enumerate(world.records.rounds[-1].parts)):
            return world._replace(chord=done)
        return world._replace(chord=None).send(Message("callback", number))

    def _resend(self, world: World, process: int) -> Iterator[Step]:
        """Let the sweeper of an idle process send the newest round if that may not have been done."""
        last = world.records.rounds[-1]
        if last.state is not RoundState.OPEN or last.published:
            return
        sent = world.hold(process, Hand("send", len(world.records.rounds)))
        if not any(hand is not None and hand.step in ("send", "mark") for hand in world.hands):
            yield "sweep: send", sent
        elif world.faults:  # it waits for two seconds before it takes a process for dead
            yield "fault: two send", sent._replace(faults=world.faults - 1)

    def _sweep(self, world: World) -> Iterator[Step]:
        """Let the sweeper end what has lasted too long, and ask again for what was lost."""
        db, number = world.records, len(world.records.rounds)
        last = db.rounds[-1]
        missing = [of.site for of, part in db.parts() if of.number == number and part.state is PartState.WAITING]
        if missing:
            yield "sweep: expire", world._replace(records=self.protocol.let_go(db, number, missing))
            if (after := self.protocol.let_surplus_go(db)) != db:
                yield "sweep: let surplus go", world._replace(records=after)
            if (after := self.protocol.let_absent_go(db, number, world.dead)) != db:
                yield "sweep: let absent go", world._replace(records=after)
        if last.leased and not world.is_held:
            yield "sweep: end lease", world._replace(records=self.protocol.end_lease(db, number))
        if last.is_ready and Message("callback", number) not in world.messages:
            yield "sweep: call back", world.send(Message("callback", number))
        in_hand = [hand.message for hand in world.hands if hand is not None and hand.message is not None]
        for of, part in db.parts():
            if part.state is PartState.LATE and of.number < number:
                yield "sweep: end late", world._replace(records=self.protocol.end_late(db, of.number))
            if part.state in OWING and db.round(of.number).published and part.attempt < self.most_attempts:
                after = self.protocol.raise_attempt(db, of, part.attempt)
                asked = world._replace(records=after).send(Message("question", *of, part.attempt + 1))
                if not any((message.number, message.site) == of for message in (*world.messages, *in_hand)):
                    yield "sweep: ask again", asked
                elif world.faults:
                    yield "fault: asked again in vain", asked._replace(faults=world.faults - 1)

    def _fail(self, world: World, after: World) -> Iterator[Step]:
        """Let something go wrong; `after` is the world with a fault less to come."""
        db = world.records
        for process, hand in enumerate(world.hands):
            if hand is not None:
                back = after.send(hand.message) if hand.message is not None else after
                yield "fault: a process dies", back.hold(process, None)
        for message in world.messages:
            yield "fault: a message is lost", after.take(message)
            if message.kind == "question" and message.site not in world.dead:
                yield "fault: a question comes twice", after.send(message._replace(kind="answer"))
            for process, hand in enumerate(world.hands):
                if hand is None and message.kind == "answer":
                    for name, twice in self._receive(after, process, message, after):
                        yield f"fault: what comes twice: {name}", twice
        if (callback := Message("callback", len(db.rounds))) not in world.messages:
            yield "fault: a callback too many", after.send(callback)
        if world.messages or world.chord is not None:
            yield "fault: the broker loses everything", after._replace(messages=frozenset(), chord=None)
        for site in db.members - world.dead:
            yield "fault: a site dies", after._replace(dead=world.dead | {site})
        if db.rounds[-1].leased:  # though its owner works
            slow = self.protocol.end_lease(db, len(db.rounds))
            yield "fault: a lease runs out", after._replace(records=slow)
        for site in db.members:
            if (left := self.protocol.leave(db, site)) != db:
                yield "fault: a site leaves", after._replace(records=left)
        yield "fault: the job is aborted", after._replace(records=self.protocol.abort(db))
