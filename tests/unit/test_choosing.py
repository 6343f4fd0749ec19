"""Whom a round asks."""

import time
from collections.abc import Sequence

import pytest

from common.errors import InvalidSettings
from common.settings import Settings
from coordinator import choosing
from coordinator.checks.choosers import check_choosers
from coordinator.checks.finding import Outcome
from coordinator.choosing import Candidate, candidates, choose
from coordinator.jobfile import JobSpec
from coordinator.jobs import Job, new_job
from tests.federation import heartbeat

SITES = tuple("abcdefghij")


def job(**spec: object) -> Job:
    values = {"name": "test", "trainer": "t", "rounds": 3, **spec}
    return new_job(JobSpec.model_validate(values), sites=SITES, model_id=None, submitted_by="")


def found(names: str = "abcdefghij", **heartbeats: dict[str, object]) -> list[Candidate]:
    return [
        Candidate(site=name, heartbeat=heartbeat(("t",)).model_copy(update=heartbeats.get(name, {}))) for name in names
    ]


@pytest.mark.parametrize(
    ("alive", "paused", "busy", "asked"),
    [
        ("abcdefghij", "", "", "abcdefghij"),
        ("abcdefghij", "ab", "", "cdefghij"),
        ("abcdef", "", "", "abcdef"),  # six of ten are a quorum
        ("abcdef", "f", "", "abcdef"),  # without the paused one they are none
        ("abcde", "", "", "abcdefghij"),  # too few: ask those as well that are away
        ("abcdefghij", "", "abcd", "efghij"),
        ("abcdefg", "", "g", "abcdef"),
        ("abcdef", "", "f", "abcdef"),  # without the busy one they are too few: a round waits for whom it has asked
        ("abcdefghij", "", "abcdefghij", "abcdefghij"),  # nobody is free: they do one part after the other
        ("", "", "", "abcdefghij"),
    ],
)
def test_who_can_be_asked(alive: str, paused: str, busy: str, asked: str) -> None:
    seen = dict.fromkeys(alive, heartbeat(("t",)))
    names = [each.site for each in candidates(job(), enabled=SITES, alive=seen, paused=paused, busy=busy)]
    assert "".join(names) == asked


def test_nobody_is_asked_who_is_disabled() -> None:
    seen = dict.fromkeys("abcdefghij", heartbeat(("t",)))
    assert [each.site for each in candidates(job(), enabled="bc", alive=seen)] == ["b", "c"]


@pytest.mark.parametrize(
    ("rules", "count"),
    [
        ({}, 10),
        ({"choose": "random", "target_sites": 4}, 4),
        ({"choose": "random", "target_fraction": 0.3}, 3),  # 0.3 * 10 is a little more than 3 to a computer
        ({"choose": "random", "target_fraction": 0.31}, 4),
        ({"choose": "random", "target_sites": 4, "over_selection": 1.3}, 6),  # 5.2
        ({"choose": "random", "target_sites": 8, "over_selection": 2}, 10),
        ({"choose": "all", "target_sites": 4}, 10),
    ],
)
def test_how_many_are_asked(rules: dict[str, object], count: int) -> None:
    assert len(choose(job(participation=rules), 1, found(), {})) == count


def test_a_random_choice_is_the_same_each_time_and_another_in_each_round_and_for_each_seed() -> None:
    rules = {"choose": "random", "target_sites": 5}
    first = choose(job(participation=rules), 1, found(), {})
    assert first == choose(job(participation=rules), 1, found(), {})
    assert len({choose(job(participation=rules), number, found(), {}) for number in range(20)}) > 10
    assert len({choose(job(participation=rules, seed=seed), 1, found(), {}) for seed in range(20)}) > 10
    counts = dict.fromkeys(SITES, 0)
    for number in range(1000):
        for site in choose(job(participation=rules), number, found(), {}):
            counts[site] += 1
    assert all(400 < count < 600 for count in counts.values())


def test_the_available_ones_have_free_slots_then_idle_processors_then_memory() -> None:
    seen = found(
        "abcd",
        a={"free_slots": 0},
        b={"cpu_percent": 80.0},
        c={"cpu_percent": 10.0, "memory_available": 1},
        d={"cpu_percent": 10.0, "memory_available": 2},
    )
    orders = [choose(job(participation={"choose": "available", "target_sites": n}), 1, seen, {}) for n in (1, 2, 3)]
    assert orders == [("d",), ("c", "d"), ("b", "c", "d")]


def none(candidates: Sequence[Candidate], count: int, number: int, seed: int) -> list[str]:
    return []


def stranger(candidates: Sequence[Candidate], count: int, number: int, seed: int) -> list[str]:
    return ["z"]


def twice(candidates: Sequence[Candidate], count: int, number: int, seed: int) -> list[str]:
    return ["a", "a"]


def hangs(candidates: Sequence[Candidate], count: int, number: int, seed: int) -> list[str]:
    time.sleep(1)
    return ["a"]


@pytest.mark.parametrize(
    ("where", "trouble"),
    [
        (f"{__name__}:none", r"gave \(\); it must give"),
        (f"{__name__}:stranger", r"gave \('z',\)"),
        (f"{__name__}:twice", r"gave \('a', 'a'\)"),
        (f"{__name__}:hangs", "took more than 0.05 s"),
        (f"{__name__}:SITES", "is no function"),
        (f"{__name__}:nothing", "cannot be loaded from .*AttributeError"),
        ("no_such_module:f", "cannot be loaded from .*ModuleNotFoundError"),
    ],
)
def test_what_a_function_of_the_operators_must_not_do(
    monkeypatch: pytest.MonkeyPatch, where: str, trouble: str
) -> None:
    monkeypatch.setattr(choosing, "_CHOOSER_SECONDS", 0.05)
    with pytest.raises(InvalidSettings, match=trouble):
        choose(job(participation={"choose": "mine", "target_sites": 1}), 1, found(), {"mine": where})


def one(candidates: Sequence[Candidate], count: int, number: int, seed: int) -> list[str]:
    return ["a"]


def test_a_function_that_gives_less_than_a_quorum_is_told_before_anybody_is_asked() -> None:
    few = {"participation": {"choose": "mine", "target_sites": 3}, "min_sites": 2}
    choosers = {"mine": f"{__name__}:one"}
    with pytest.raises(InvalidSettings, match="gave 1 of 10 candidates, but the quorum is 2; let it give as many, or"):
        choose(job(**few), 1, found(), choosers)
    assert choose(job(**few, late={"policy": "keep"}), 1, found(), choosers) == ("a",)


def test_the_doctor_tells_a_function_that_cannot_be_loaded_before_a_job_does() -> None:
    settings = Settings(choosers={"good": f"{__name__}:none", "wrong": "no_such_module:f"})
    good, wrong = check_choosers(settings)
    assert (good.check, good.outcome) == ("chooser good", Outcome.OK)
    assert (wrong.check, wrong.outcome) == ("chooser wrong", Outcome.FAULT)
    assert "correct FEDCHORD_CHOOSERS" in wrong.sentence
