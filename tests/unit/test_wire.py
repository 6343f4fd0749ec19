"""Facts about datetimes on the wire."""

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidInput
from store.models import ModelState
from store.wire import from_wire, to_wire

AT = datetime(2026, 3, 29, 2, 30, 0, 123456, tzinfo=timezone(timedelta(hours=2)))
ON_THE_WIRE = {"_type": "datetime", "val": "2026-03-29T02:30:00.123456+02:00"}

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
times = st.datetimes(min_value=datetime(1900, 1, 1), max_value=datetime(2200, 1, 1), timezones=st.just(UTC))
names = st.text().filter(lambda name: name not in ("_type", "model_meta", "metrics"))
documents = st.recursive(
    plain | times, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=20
)


def test_a_datetime_has_the_documented_form() -> None:
    assert to_wire({"created_at": AT, "all": (AT, 1)}) == {"created_at": ON_THE_WIRE, "all": [ON_THE_WIRE, 1]}


def test_it_comes_back_as_the_same_moment_in_the_local_zone() -> None:
    back = from_wire({"created_at": ON_THE_WIRE})["created_at"]
    assert back == AT
    assert back.utcoffset() == AT.astimezone().utcoffset()


@given(documents)
def test_every_document_comes_back_through_json(document: Any) -> None:
    assert from_wire(json.loads(json.dumps(to_wire(document)))) == document


def test_what_users_keep_is_passed_on_even_if_it_looks_like_ours() -> None:
    theirs = {"_type": "datetime", "val": "never", "more": [ON_THE_WIRE, ON_THE_WIRE | {"x": 1}]}
    document = {"model_meta": theirs, "metrics": {"at": ON_THE_WIRE}, "model_state": ModelState.CREATED}
    assert to_wire(document) == document
    assert from_wire(document) == document
    assert from_wire([document]) == [document]


@pytest.mark.parametrize("other", [{"_type": "date", "val": "x"}, {"_type": "datetime"}, ON_THE_WIRE | {"x": 1}])
def test_what_is_not_exactly_a_datetime_stays_what_it_is(other: Any) -> None:
    assert from_wire(other) == other


@pytest.mark.parametrize(
    "val",
    ["", "yesterday", "2026-01-01", "2026-01-01T00:00:00", 5, None, [], "0001-01-01T00:00:00+23:00", "9" * 9999],
)
def test_what_only_looks_like_a_datetime_is_refused(val: Any) -> None:
    with pytest.raises(InvalidInput, match="is not a datetime") as raised:
        from_wire({"at": {"_type": "datetime", "val": val}})
    assert len(raised.value.message) < 400


def test_what_is_nested_too_deep_is_refused_without_harm() -> None:
    deep: Any = 1
    for _ in range(900):  # more than Python nests calls here
        deep = [deep]
    with pytest.raises(InvalidInput, match="deeper than 64"):
        from_wire(deep)
    assert from_wire({"model_meta": deep}) == {"model_meta": deep}
