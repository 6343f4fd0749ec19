"""Facts about conditions: what they select is what Python would, and every mistake is named."""

import operator
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from common.errors import InvalidInput
from store.conditions import FIELDS, MAX_TERMS, parse_condition, parse_order
from store.database import open_database, reading, upgrade, writing
from store.models import ModelInfo, add_model, find_models

START = datetime(2026, 1, 1, tzinfo=UTC)
KINDS = ("", "update", "global", "50%", "a_b", "A_b")
SITES = (None, "site-01", "site-02")
TIMES = (None, START, START + timedelta(hours=1))
MODELS = [
    ModelInfo(
        model_id=f"m{number}",
        store="ddc:digits",
        model_hash=f"{number:064x}",
        model_size=number,
        model_kind=KINDS[number % len(KINDS)],
        round=number % 5,
        site=SITES[number % len(SITES)],
        start_datetime=TIMES[number // 3 % len(TIMES)],
        num_examples=None if number % 4 == 0 else number,
    )
    for number in range(40)
]
COMPARED = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
VALUES: dict[str, Any] = {
    "model_kind": st.sampled_from(KINDS),
    "round": st.integers(-1, 6),
    "site": st.sampled_from(["site-01", "site-02", "site-03"]),
    "start_datetime": st.sampled_from([time.isoformat() for time in TIMES if time is not None]),
    "num_examples": st.integers(0, 40),
}
fields = st.sampled_from(sorted(VALUES))
orderable = st.sampled_from(["round", "model_kind", "num_examples"])


@st.composite
def comparisons(draw: st.DrawFn) -> Any:
    name = draw(fields)
    sign = draw(st.sampled_from([*COMPARED, "in", "like", "null"]))
    if sign == "like":
        pieces = st.sampled_from(["%", "_", r"\%", r"\_", "a", "A", "b", "up", "date", "site", "5", "-"])
        return {"like": [draw(st.sampled_from(["model_kind", "site"])), "".join(draw(st.lists(pieces, max_size=4)))]}
    if sign == "null":
        return {draw(st.sampled_from(["=", "!="])): [name, None]}
    if sign == "in":
        return {"in": [name, draw(st.lists(VALUES[name] | st.none(), max_size=3))]}
    return {sign: [name, draw(VALUES[name])]}


conditions = st.recursive(
    comparisons(),
    lambda inner: st.one_of(
        st.builds(lambda parts: {"and": parts}, st.lists(inner, max_size=3)),
        st.builds(lambda parts: {"or": parts}, st.lists(inner, max_size=3)),
        st.builds(lambda part: {"not": part}, inner),
        st.builds(lambda one, other: {**one, **other}, inner, inner),
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = open_database(f"sqlite:///{tmp_path_factory.mktemp('conditions')}/records.db")
    upgrade(engine)
    with writing(engine) as connection:
        for info in MODELS:
            add_model(connection, info)
    yield engine
    engine.dispose()


def meets(info: ModelInfo, condition: dict[str, Any]) -> bool:
    """Say what a condition means, in Python."""
    return all(meets_one(info, sign, operand) for sign, operand in condition.items())


def meets_one(info: ModelInfo, sign: str, operand: Any) -> bool:
    if sign == "and":
        return all(meets(info, part) for part in operand)
    if sign == "or":
        return any(meets(info, part) for part in operand)
    if sign == "not":
        return not meets(info, operand)
    name, value = operand
    own = getattr(info, name)
    if sign == "in":
        return any(meets_one(info, "=", [name, each]) for each in value)
    if isinstance(own, datetime) and value is not None:
        value = datetime.fromisoformat(value)
    if own is None or value is None:
        return {"=": own is value, "!=": own is not value}.get(sign, False)
    if sign == "like":
        parts = re.findall(r"\\.|.", value)
        pattern = "".join({"%": ".*", "_": "."}.get(part, re.escape(part.removeprefix("\\"))) for part in parts)
        return re.fullmatch(pattern, own, re.IGNORECASE) is not None
    return bool(COMPARED[sign](own, value))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(conditions)
def test_a_condition_selects_what_it_says(engine: Engine, condition: dict[str, Any]) -> None:
    with reading(engine) as connection:
        found = find_models(connection, conditions=parse_condition(condition), newest_first=False)
    assert [info.model_id for info in found] == [info.model_id for info in MODELS if meets(info, condition)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["", "-"]), orderable), min_size=1, max_size=16))
def test_an_order_sorts_as_it_says(engine: Engine, order: list[tuple[str, str]]) -> None:
    with reading(engine) as connection:
        found = find_models(connection, order=parse_order([sign + name for sign, name in order]))
    expected = MODELS if order[-1][0] == "" else MODELS[::-1]
    for sign, name in reversed(order):

        def key(info: ModelInfo, name: str = name) -> Any:
            value = getattr(info, name)
            return (value is not None, value if value is not None else 0)

        expected = sorted(expected, key=key, reverse=sign == "-")
    assert [info.model_id for info in found] == [info.model_id for info in expected]


def test_every_field_can_be_asked_for_and_ordered_by(engine: Engine) -> None:
    with reading(engine) as connection:
        for name in FIELDS:
            query = parse_condition({"!=": [name, None]})
            assert len(find_models(connection, conditions=query, order=parse_order(f"-{name}"))) <= len(MODELS)


@pytest.mark.parametrize("value", [START, START.isoformat(), {"_type": "datetime", "val": "2026-01-01T01:00:00+01:00"}])
def test_a_time_may_be_written_in_three_ways(engine: Engine, value: object) -> None:
    with reading(engine) as connection:
        found = find_models(connection, conditions=parse_condition({"=": ["start_datetime", value]}))
    assert {info.start_datetime for info in found} == {START}


def test_what_looks_like_sql_is_a_value(engine: Engine) -> None:
    with reading(engine) as connection:
        query = parse_condition({"=": ["model_kind", "' OR 1=1 --"]})
        assert find_models(connection, conditions=query) == ()
    assert "OR 1=1" not in str(query)


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        (None, "None is no condition; write it like"),
        ([], r"\[\] is no condition"),
        ("x = 1", "'x = 1' is no condition"),
        ({"==": ["round", 1]}, "no operator '=='"),
        ({"=": ["rounds", 1]}, "no field 'rounds' to ask for; there are model_id"),
        ({"=": ["model_meta", {}]}, "no field 'model_meta'"),
        ({"=": ["sequence", 1]}, "no field 'sequence'"),
        ({"=": "round"}, 'follows "=" in a condition is a list'),
        ({"=": ["round"]}, "is a field and a value"),
        ({"=": [1, "round"]}, "is a field and a value"),
        ({"=": ["round", "1"]}, "round is a whole number"),
        ({"=": ["round", 1.0]}, "round is a whole number"),
        ({"=": ["round", True]}, "round is a whole number"),
        ({"=": ["round", 2**31]}, "round is a whole number"),
        ({"=": ["model_size", 2**63]}, "model_size is a whole number"),
        ({"=": ["model_kind", 1]}, "model_kind is text"),
        ({"=": ["model_kind", "a\0"]}, "model_kind is text"),
        ({"=": ["model_kind", "\ud800"]}, "model_kind is text"),
        ({"<": ["round", None]}, '"<" cannot compare round with null'),
        ({"in": ["round", 1]}, '"in" compares round with a list'),
        ({"in": ["round", ["a"]]}, "round is a whole number"),
        ({"like": ["round", "1%"]}, '"like" compares text, and round is none'),
        ({"like": ["model_kind", 1]}, '"like" takes a pattern'),
        ({"like": ["model_kind", "a" * 201]}, '"like" takes a pattern of at most 200'),
        ({"like": ["model_kind", "a\\"]}, r"\\ comes before"),
        ({"like": ["model_kind", r"\a"]}, r"\\ comes before"),
        ({"=": ["created_at", "yesterday"]}, "'yesterday' is not a datetime"),
        ({"=": ["created_at", 5]}, "'5' is not a datetime"),
        ({"=": ["created_at", datetime(2026, 1, 1)]}, "is not a datetime"),
        ({"and": {"=": ["round", 1]}}, 'follows "and" in a condition is a list'),
        ({"not": [{"=": ["round", 1]}]}, "is no condition"),
        ({"and": [{"=": ["round", 1]}, {"oops": 1}]}, "no operator 'oops'"),
        ({"in": ["round", list(range(MAX_TERMS))]}, "more than 200 terms"),
        ({"or": [{"=": ["round", 1]}] * MAX_TERMS}, "more than 200 terms"),
        ({"x" * 10_000: 1}, "no operator"),
    ],
)
def test_a_mistake_is_named(condition: object, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as raised:
        parse_condition(condition)
    assert len(raised.value.message) < 500


def test_a_condition_of_any_depth_is_refused_without_harm() -> None:
    deep: dict[str, Any] = {"=": ["round", 1]}
    for _ in range(15):
        deep = {"not": deep}
    parse_condition(deep)
    for _ in range(100_000):
        deep = {"not": deep}
    with pytest.raises(InvalidInput, match="deeper than 16 levels"):
        parse_condition(deep)


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("oops", "no field 'oops'"),
        ("--round", "no field '-round'"),
        ("", "no field ''"),
        ([], "order is a field's name"),
        (["round"] * 17, "list of 1 to 16"),
        (["round", 1], "order holds 1"),
        ({"round": 1}, "order is a field's name"),
        (1, "order is a field's name"),
    ],
)
def test_a_mistake_in_an_order_is_named(order: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        parse_order(order)
