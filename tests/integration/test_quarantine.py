"""What was quarantined is kept, and a person decides: whatever dies in between, and however often it is done."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select, update

from common.errors import Conflict, FedChordError, NotFound
from common.messages import COORDINATOR, Envelope, Message, Shard, UpdateReady, UpdateRoundStart
from coordinator import closing, gate, quarantine, releasing
from coordinator.cli.entry import cli
from coordinator.closing import settle_round, start_job
from coordinator.gate import receive_answer
from coordinator.jobs import Job
from coordinator.parts import Part, find_parts
from coordinator.quarantine import Entry, EntryState, find_entries, find_entry, keep_quarantine
from coordinator.releasing import refuse, release
from coordinator.rounds import get_round
from coordinator.services import Services
from coordinator.states import RoundState
from coordinator.submitting import submit
from store.blobs import Blob, hash_bytes
from store.database import reading, writing
from store.garbage import remove_unused
from store.models import find_models, get_model
from store.tables import audit, rounds, utc_now
from store.tables import quarantine as table
from tests.contract.postgres import PostgresServer
from tests.federation import Federation, ScriptedSite, federation, read_model, wait_until

NAMES = ("alpha", "beta", "gamma")
Tensors = Mapping[str, np.ndarray]


class Killed(BaseException):
    """The process ends here."""


def model(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full(3, value, np.float32)}


@contextmanager
def opened(folder: Path, **settings: Any) -> Iterator[Federation]:
    """Open a federation whose sites' answers are taken in this process; nothing happens unless a test does it."""
    with federation(folder, *NAMES, **settings) as made:
        for site in made.sites.values():

            def send(message: Message, *, key: object = None, site: ScriptedSite = site) -> None:
                del key
                receive_answer(
                    made.services, Envelope.seal(message, sender=site.name, recipient=COORDINATOR, key=site.key)
                )

            site.send = send  # type: ignore[method-assign]
        yield made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with opened(tmp_path_factory.mktemp("federation")) as federation:
        yield federation


@dataclass
class Begun:
    """A job whose first training round is open."""

    made: Federation
    job: Job
    messages: dict[str, UpdateRoundStart]

    @property
    def services(self) -> Services:
        return self.made.services

    @property
    def round_id(self) -> str:
        return f"{self.job.job_id}.train.1"

    @property
    def task_id(self) -> str:
        return f"{self.round_id}.alpha"

    def answer(self, site: str, tensors: Tensors | None, **changes: Any) -> UpdateReady:
        return self.made.sites[site].answer(self.messages[site], tensors, **changes)

    def entry(self) -> Entry:
        with reading(self.services.engine) as connection:
            return find_entry(connection, self.task_id)

    def parts(self) -> dict[str, Part]:
        with reading(self.services.engine) as connection:
            return {part.site: part for part in find_parts(connection, self.round_id)}

    def round_state(self) -> RoundState:
        with reading(self.services.engine) as connection:
            return get_round(connection, self.round_id).state

    def close(self) -> list[float]:
        """Let the others answer and settle the round; return the new global model."""
        for site in ("beta", "gamma"):
            if self.parts()[site].state == "waiting":
                self.answer(site, model(4))
        settle_round(self.services, self.round_id)
        assert self.round_state() is RoundState.CLOSED
        return self.values()

    def values(self) -> list[float]:
        return self.made.model(self.job.job_id)["w"].tolist()

    def content(self, blob: Blob) -> bytes:
        with self.services.blobs.open(blob) as file:
            return file.read()


def begin(made: Federation, **spec: Any) -> Begun:
    for site in made.sites.values():
        site.forget()
    job = submit(made.services, made.spec(min_sites=1, **spec))
    start_job(made.services, job.job_id)
    for site in made.sites.values():
        site.start(model(1))
    settle_round(made.services, f"{job.job_id}.start.0")
    messages = {}
    for name, site in made.sites.items():
        message = site.receive()
        assert isinstance(message, UpdateRoundStart)
        messages[name] = message
    return Begun(made=made, job=job, messages=messages)


def audited(begun: Begun) -> list[tuple[str, str]]:
    with reading(begun.services.engine) as connection:
        query = select(audit.c.actor, audit.c.action).where(audit.c.subject == begun.task_id).order_by(audit.c.id)
        return [(row.actor, row.action) for row in connection.execute(query)]


def clean_up(services: Services) -> None:
    """Remove what nothing needs, as the sweeper does, but at once."""
    keep_quarantine(services)
    services.blobs.clean(older_than_seconds=-1)
    remove_unused(services.engine, services.blobs, older_than_seconds=-1)


# Tests that look for removed bytes send values of their own: what another test's update has, too, is not removed.
BOUND = {"gate": {"max_norm": 10.0}}  # what is beyond it could be aggregated


def test_a_refused_update_is_kept_with_all_that_is_known_of_it(made: Federation) -> None:
    begun = begin(made, **BOUND)
    sent = begun.answer("alpha", model(100), num_examples=7, metrics={"loss": 0.5})
    entry = begun.entry()
    announced = tuple(Blob(digest=shard.digest, size=shard.size) for shard in sent.shards)
    assert (entry.state, entry.site, entry.job_id, entry.round_id) == (
        EntryState.HELD, "alpha", begun.job.job_id, begun.round_id,
    )  # fmt: skip
    assert entry.announced == entry.found == announced
    assert entry.is_stored
    assert (entry.num_examples, entry.metrics, entry.size) == (7, {"loss": 0.5}, announced[0].size)
    assert entry.update_norm == pytest.approx(99 * 3**0.5)
    assert entry.reason == "The update is 171.473 away from the global model; [gate] max_norm is 10."
    assert hash_bytes(begun.content(announced[0])) == announced[0]
    assert begun.close() == [4, 4, 4]


def test_the_bytes_stay_until_time_runs_out_and_then_go_but_for_those_that_a_model_needs(made: Federation) -> None:
    begun = begin(made, **BOUND)
    begun.answer("alpha", model(101))
    begun.answer("beta", model(1), num_examples=0)  # the global model's own bytes
    begun.answer("gamma", model(4))
    (held,) = begun.entry().found
    assert held is not None
    clean_up(begun.services)
    assert begun.content(held)
    begun.close()
    with writing(begun.services.engine) as connection:
        late = utc_now() - timedelta(days=begun.services.settings.quarantine_days, seconds=1)
        mine = table.c.task_id.startswith(begun.round_id)
        connection.execute(update(table).where(mine).values(created_at=late))
    assert keep_quarantine(begun.services) == 2
    assert keep_quarantine(begun.services) == 0
    clean_up(begun.services)
    entry = begun.entry()
    assert (entry.state, entry.decided_by) == (EntryState.EXPIRED, "sweeper")
    assert entry.found == (held,)  # the record stays
    assert audited(begun) == [("sweeper", "quarantine.expired")]
    with pytest.raises(NotFound):
        begun.services.blobs.open(held)
    with reading(begun.services.engine) as connection:
        first = find_models(connection, job_id=begun.job.job_id, kind="initial")[0]
    assert read_model(begun.services, first)["w"].tolist() == [1, 1, 1]
    with pytest.raises(Conflict, match=r"is expired by sweeper; that cannot be changed"):
        release(begun.services, begun.task_id, by="ann")


def test_bytes_that_are_not_what_was_announced_are_kept_as_they_were_found(made: Federation) -> None:
    begun = begin(made)
    (shard,) = made.sites["alpha"].upload(begun.messages["alpha"], model(9))
    begun.answer("alpha", None, shards=(shard.model_copy(update={"digest": "0" * 64}),))
    entry = begun.entry()
    assert entry.announced == (Blob(digest="0" * 64, size=shard.size),)
    assert entry.found == (Blob(digest=shard.digest, size=shard.size),)
    assert entry.is_stored
    clean_up(begun.services)
    found = entry.found[0]
    assert found is not None
    assert hash_bytes(begun.content(found)) == found
    with pytest.raises(Conflict, match="whoever decides: What came is not what the site announced"):
        release(begun.services, begun.task_id, by="ann")
    assert begun.entry().state is EntryState.HELD
    begun.close()


def test_more_bytes_than_the_gate_would_take_are_not_kept(made: Federation) -> None:
    begun = begin(made)
    bodies = Path(begun.services.settings.blob_folder) / "bodies"
    before = set(bodies.iterdir())
    (shard,) = made.sites["alpha"].upload(begun.messages["alpha"], {"w": np.zeros(10**6, np.float32)})
    assert set(bodies.iterdir()) != before
    begun.answer("alpha", None, shards=(shard.model_copy(update={"size": 100}),))
    assert begun.entry().found == (None,)
    assert set(bodies.iterdir()) == before
    begun.close()


def test_what_never_came_is_listed_without_bytes(made: Federation) -> None:
    begun = begin(made)
    begun.answer("alpha", None, shards=(Shard(digest="1" * 64, size=100),))
    begun.answer("beta", None)
    entry = begun.entry()
    assert (entry.found, entry.size, entry.is_stored) == ((None,), 0, True)
    assert begun.close() == [4, 4, 4]


def test_a_released_update_counts_while_its_round_is_open_and_once(made: Federation) -> None:
    begun = begin(made, **BOUND)
    begun.answer("alpha", model(100), num_examples=2)
    begun.answer("beta", model(4))
    for _ in range(3):
        entry = release(begun.services, begun.task_id, by="ann")
        assert (entry.state, entry.decided_by) == (EntryState.RELEASED, "ann")
    assert begun.parts()["alpha"].state == "accepted"
    with pytest.raises(Conflict, match="is released by ann"):
        refuse(begun.services, begun.task_id, by="bob")
    assert begun.close() == [52, 52, 52]  # (2*100 + 4 + 4) / 4
    with reading(begun.services.engine) as connection:
        updates = find_models(connection, job_id=begun.job.job_id, kind="update")
        made_of = get_model(connection, begun.made.job(begun.job.job_id).model_id or "")
    assert sorted(str(each.site) for each in updates) == ["alpha", "beta", "gamma"]
    assert made_of.model_meta["sites"] == ["alpha", "beta", "gamma"]
    assert entry.model_id in made_of.parents
    assert audited(begun) == [("ann", "quarantine.released")]
    clean_up(begun.services)
    assert begun.content(begun.entry().announced[0])


def test_who_is_released_is_not_taken_out_again_as_an_outlier(made: Federation) -> None:
    begun = begin(made, gate={"max_norm": 10.0, "outlier_score": 6.0})
    begun.answer("alpha", model(1e9))
    release(begun.services, begun.task_id, by="ann")
    assert begun.close()[0] == pytest.approx(1e9 / 3, rel=1e-3)


def test_an_update_released_after_its_round_becomes_a_model_that_nothing_is_made_of(made: Federation) -> None:
    begun = begin(made, **BOUND)
    begun.answer("alpha", model(100))
    before = begun.close()
    for _ in range(2):
        with pytest.raises(Conflict, match=r"does not count: it is kept as model .*, which is not aggregated"):
            release(begun.services, begun.task_id, by="ann")
    entry = begun.entry()
    assert entry.state is EntryState.KEPT
    with reading(begun.services.engine) as connection:
        kept = get_model(connection, entry.model_id or "")
        updates = find_models(connection, job_id=begun.job.job_id, kind="update")
    assert (kept.site, kept.model_meta["aggregated"]) == ("alpha", False)
    assert sorted(str(each.site) for each in updates) == ["alpha", "beta", "gamma"]
    assert begun.parts()["alpha"].state == "quarantined"
    assert begun.values() == before
    clean_up(begun.services)
    assert read_model(begun.services, kept)["w"].tolist() == [100, 100, 100]


def test_an_outlier_can_be_looked_at_refused_and_kept(made: Federation) -> None:
    begun = begin(made)
    begun.answer("alpha", model(4e6))
    assert begun.parts()["alpha"].state == "accepted"  # alone, it stands out from nothing
    begun.close()
    entry = begun.entry()
    assert entry.state is EntryState.HELD
    assert entry.found == entry.announced
    assert "more than 1000 times" in entry.reason
    clean_up(begun.services)
    assert begun.content(entry.announced[0])
    with pytest.raises(Conflict, match="kept as model"):
        release(begun.services, begun.task_id, by="ann")


@pytest.mark.parametrize(
    ("tensors", "changes", "reason"),
    [
        ({"w": np.float32([1, np.nan, 1])}, {}, "is not finite: element 1 is NaN"),
        ({"w": np.ones(3, np.float64)}, {}, "has dtype F64; expected F32"),
        (model(2), {"num_examples": 0}, "num_examples is 0"),
        (model(2), {"num_examples": 10**15}, "num_examples is 1000000000001; expected 1 to 1000000000000"),
        (None, {}, "the answer names no shard"),
    ],
    ids=["not finite", "dtype", "no examples", "absurd examples", "empty"],
)
def test_what_can_never_be_aggregated_is_not_released_whoever_decides(
    made: Federation, tensors: Tensors | None, changes: dict[str, Any], reason: str
) -> None:
    begun = begin(made)
    begun.answer("alpha", tensors, **changes)
    with pytest.raises(Conflict, match=f"cannot be aggregated, whoever decides: .*{reason}"):
        release(begun.services, begun.task_id, by="ann")
    assert begun.entry().state is EntryState.HELD
    assert audited(begun) == []
    assert begun.close() == [4, 4, 4]


def test_more_examples_than_the_job_allows_can_be_released(made: Federation) -> None:
    begun = begin(made, gate={"max_examples": 10})
    begun.answer("alpha", model(1), num_examples=22)
    release(begun.services, begun.task_id, by="ann")
    assert begun.close() == pytest.approx([1.25] * 3)  # (22*1 + 4 + 4) / 24


def test_refused_bytes_are_removed_and_the_record_says_who_and_when(made: Federation) -> None:
    begun = begin(made, **BOUND)
    begun.answer("alpha", model(102))
    begun.close()
    (held,) = begun.entry().announced
    for _ in range(2):
        entry = refuse(begun.services, begun.task_id, by="bob")
        assert (entry.state, entry.decided_by, entry.announced) == (EntryState.REFUSED, "bob", (held,))
        assert entry.decided_at is not None
        with pytest.raises(NotFound):
            begun.services.blobs.open(held)
    assert audited(begun) == [("bob", "quarantine.refused")]
    with pytest.raises(Conflict, match="is refused by bob"):
        release(begun.services, begun.task_id, by="ann")


def test_refused_bytes_stay_while_the_round_goes_on_and_go_at_the_next_clean_up(made: Federation) -> None:
    begun = begin(made, **BOUND)
    begun.answer("alpha", model(103))
    (held,) = begun.entry().announced
    refuse(begun.services, begun.task_id, by="bob")
    assert begun.content(held)
    assert begun.close() == [4, 4, 4]
    clean_up(begun.services)
    with pytest.raises(NotFound):
        begun.services.blobs.open(held)


def test_nobody_can_have_a_model_of_others_removed_by_being_refused(made: Federation) -> None:
    """An update whose bytes are those of the global model's shard, or of its index, which anybody can work out."""
    begun = begin(made)
    with reading(begun.services.engine) as connection:
        first = find_models(connection, job_id=begun.job.job_id, kind="initial")[0]
    index = begun.services.blobs.find(first.model_hash)
    data = begun.content(index)
    slot = begun.parts()["alpha"].slot(0)
    Path(begun.services.blobs.write_url(slot, seconds=60).removeprefix("file://")).write_bytes(data)
    begun.answer("alpha", None, shards=(Shard(digest=index.digest, size=index.size),))
    begun.answer("beta", model(1), num_examples=0)
    assert begun.entry().found == (index,)
    assert begun.close() == [4, 4, 4]
    for task_id in (begun.task_id, f"{begun.round_id}.beta"):
        refuse(begun.services, task_id, by="bob")
    clean_up(begun.services)
    assert read_model(begun.services, first)["w"].tolist() == [1, 1, 1]


def test_a_crash_between_the_verdict_and_the_bytes_loses_nothing(
    made: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = begin(made)
    (shard,) = made.sites["alpha"].upload(begun.messages["alpha"], model(9))
    lie = shard.model_copy(update={"digest": "0" * 64})
    with monkeypatch.context() as patched:
        patched.setattr(gate, "keep_bytes", _kill)
        with pytest.raises(Killed):
            begun.answer("alpha", None, shards=(lie,))
    assert not begun.entry().is_stored
    begun.answer("alpha", None, shards=(lie,))  # the broker hands the answer out again
    assert keep_quarantine(begun.services) == 0
    assert not begun.entry().is_stored  # whoever took it may still be at it
    monkeypatch.setattr(quarantine, "_PATIENCE_SECONDS", -1.0)
    for _ in range(2):
        keep_quarantine(begun.services)
    entry = begun.entry()
    assert entry.is_stored
    assert entry.found == (Blob(digest=shard.digest, size=shard.size),)
    assert begun.content(entry.found[0])
    assert begun.close() == [4, 4, 4]


def test_bytes_that_change_after_the_verdict_are_not_taken_for_what_was_found(
    made: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = begin(made)
    with monkeypatch.context() as patched:
        patched.setattr(gate, "keep_bytes", _kill)
        with pytest.raises(Killed):
            begun.answer("alpha", model(9), num_examples=0)
    slot = begun.parts()["alpha"].slot(0)
    body = Path(begun.services.blobs.write_url(slot, seconds=60).removeprefix("file://"))
    body.unlink()
    body.write_bytes(b"something else")
    monkeypatch.setattr(quarantine, "_PATIENCE_SECONDS", -1.0)
    keep_quarantine(begun.services)
    assert (begun.entry().found, begun.entry().is_stored) == ((None,), True)
    begun.close()


def _kill(*_args: object, **_options: object) -> None:
    raise Killed


@pytest.mark.parametrize("point", ["make_model", "close_round", "set_aside", "add_model", "change_job", "plan_next"])
def test_a_crash_while_a_round_with_an_outlier_is_settled_changes_nothing(
    made: Federation, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    begun = begin(made)
    begun.answer("alpha", model(4e6))
    begun.answer("beta", model(3))
    begun.answer("gamma", model(4))
    with monkeypatch.context() as patched:
        patched.setattr(closing, point, _kill)
        with pytest.raises(Killed):
            settle_round(begun.services, begun.round_id)
    assert {part.state for part in begun.parts().values()} == {"accepted"}
    with writing(begun.services.engine) as connection:  # so that the test need not wait for it
        ended = utc_now() - timedelta(seconds=1)
        connection.execute(update(rounds).where(rounds.c.round_id == begun.round_id).values(lease_until=ended))
    assert begun.close() == [3.5, 3.5, 3.5]
    assert begun.parts()["alpha"].state == "quarantined"
    assert begun.entry().state is EntryState.HELD


@pytest.mark.parametrize("point", ["decide", "overrule_part", "add_model"])
def test_a_crash_while_an_update_is_released_leaves_it_held(
    made: Federation, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    begun = begin(made, **BOUND)
    begun.answer("alpha", model(100))
    with monkeypatch.context() as patched:
        patched.setattr(releasing, point, _kill)
        with pytest.raises(Killed):
            release(begun.services, begun.task_id, by="ann")
    assert begun.entry().state is EntryState.HELD
    assert begun.parts()["alpha"].state == "quarantined"
    assert audited(begun) == []
    release(begun.services, begun.task_id, by="ann")
    assert begun.close() == [36, 36, 36]


def test_a_crash_while_an_update_is_refused_is_made_good_by_repeating_it(
    made: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = begin(made, **BOUND)
    begun.answer("alpha", model(104))
    begun.close()
    with monkeypatch.context() as patched:
        patched.setattr(releasing, "remove_blobs", _kill)
        with pytest.raises(Killed):
            refuse(begun.services, begun.task_id, by="bob")
    assert begun.entry().state is EntryState.REFUSED
    refuse(begun.services, begun.task_id, by="bob")
    with pytest.raises(NotFound):
        begun.services.blobs.open(begun.entry().announced[0])
    assert audited(begun) == [("bob", "quarantine.refused")]


def test_a_test_round_s_answer_is_released_while_it_can_count(made: Federation) -> None:
    begun = begin(made, test_every=1, gate={"max_examples": 10})
    begun.answer("alpha", model(4))
    begun.close()
    message = made.sites["alpha"].receive()
    made.sites["alpha"].answer(message, num_examples=11, metrics={"accuracy": 0.5})
    task_id = f"{begun.job.job_id}.test.1.alpha"
    assert release(begun.services, task_id, by="ann").state is EntryState.RELEASED
    message = made.sites["beta"].receive()
    made.sites["beta"].answer(message, num_examples=11, metrics={"accuracy": 0.5})
    message = made.sites["gamma"].receive()
    made.sites["gamma"].answer(message, num_examples=10, metrics={"accuracy": 1.0})
    settle_round(begun.services, f"{begun.job.job_id}.test.1")
    with reading(begun.services.engine) as connection:
        metrics = get_round(connection, f"{begun.job.job_id}.test.1").metrics
    assert metrics["accuracy"] == pytest.approx((11 * 0.5 + 10 * 1.0) / 21)
    with pytest.raises(Conflict, match="has ended, so the answer of beta cannot count"):
        release(begun.services, f"{begun.job.job_id}.test.1.beta", by="ann")


def run(made: Federation, capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    cli.main(["--config", str(made.config), "quarantine", *arguments, "--json"], standalone_mode=False)
    return json.loads(capsys.readouterr().out)


def test_the_commands_list_show_release_and_refuse(made: Federation, capsys: pytest.CaptureFixture[str]) -> None:
    begun = begin(made, **BOUND)
    begun.answer("alpha", model(100))
    begun.answer("beta", model(200))
    job_id = begun.job.job_id
    listed = run(made, capsys, "list", "--job", job_id[:13])
    assert [entry["task_id"] for entry in listed] == [f"{begun.round_id}.beta", begun.task_id]
    assert {entry["state"] for entry in listed} == {"held"}
    shown = run(made, capsys, "show", begun.task_id[:-2])
    assert shown["announced"] == shown["found"]
    assert shown["expires_at"] is not None
    assert run(made, capsys, "release", begun.task_id)["state"] == "released"
    assert run(made, capsys, "refuse", f"{begun.round_id}.beta")["state"] == "refused"
    assert begun.close() == [52, 52, 52]
    assert len(run(made, capsys, "--limit", "1")) == 1
    with pytest.raises(FedChordError, match="There is no task whose id begins with 'nothing'"):
        run(made, capsys, "show", "nothing")
    with pytest.raises(FedChordError, match="More than one task has an id that begins with"):
        run(made, capsys, "show", begun.round_id)
    cli.main(["--config", str(made.config), "quarantine", "show", begun.task_id], standalone_mode=False)
    said = capsys.readouterr().out
    assert "Reason      The update is 171.473 away from the global model" in said
    assert "Distance    171.5 from a global model of norm 1.732" in said
    cli.main(["--config", str(made.config), "quarantine"], standalone_mode=False)
    assert begun.task_id in capsys.readouterr().out


def test_it_works_over_postgresql_and_no_coordinator_claims_a_round_during_a_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PostgresServer() as server, opened(tmp_path, database_url=server.new_database()) as made:
        begun = begin(made, **BOUND)
        begun.answer("alpha", model(100))
        begun.answer("beta", model(4))
        begun.answer("gamma", model(4))  # nothing is missing: whoever comes may claim the round
        settled = threading.Thread(target=settle_round, args=(begun.services, begun.round_id))
        original = releasing.overrule_part

        def slowly(*arguments: Any, **values: Any) -> bool:
            settled.start()  # after the round is locked, and before the release is written
            settled.join(0.5)
            assert settled.is_alive()
            return original(*arguments, **values)

        monkeypatch.setattr(releasing, "overrule_part", slowly)
        assert release(begun.services, begun.task_id, by="ann").state is EntryState.RELEASED
        settled.join()
        wait_until(lambda: begun.round_state() is RoundState.CLOSED, what="the round")
        assert begun.values() == [36, 36, 36]
        with reading(begun.services.engine) as connection:
            assert [entry.state for entry in find_entries(connection)] == [EntryState.RELEASED]
