"""Messages: versioned, signed, and refused with a reason when they are not what they should be."""

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import BadSignature, InvalidMessage, UnknownKind, UnknownVersion
from common.messages import (
    ANSWERS,
    COORDINATOR,
    MAX_MESSAGE_BYTES,
    SITE_MESSAGES,
    ClientRemoved,
    Envelope,
    ModelReference,
    SourceShard,
    UpdateReady,
    UpdateRoundStart,
)
from common.queues import Kind
from common.signing import SigningKey

KEY = SigningKey.generate()
MESSAGE = UpdateRoundStart(
    job_id="job",
    round=3,
    task_id="job.train.3.alpha",
    deadline_at=1700000000.5,
    trainer="constant",
    config={"local_epochs": 2, "nested": {"a": [1, None, "x"]}},
    shard_bytes=1024,
    upload_urls=("https://store/slot",),
    model=ModelReference(
        model_id="m", digest="0" * 64, shards=(SourceShard(digest="1" * 64, size=9, url="https://store/blob"),)
    ),
)


def seal(message: Any = MESSAGE, *, recipient: str = "alpha") -> bytes:
    return Envelope.seal(message, sender=COORDINATOR, recipient=recipient, key=KEY)


def open_as(data: object, *, recipient: str = "alpha") -> Any:
    return Envelope.read(data).open(SITE_MESSAGES, recipient=recipient, public_key=KEY.public_key)


def test_a_sealed_message_opens_as_itself() -> None:
    assert open_as(seal()) == MESSAGE


def test_the_six_kinds_of_the_architecture_have_a_message_each() -> None:
    assert set(SITE_MESSAGES) == {kind.value for kind in Kind}


def test_the_bytes_of_a_message_do_not_change() -> None:
    body = msgpack.packb(ClientRemoved(job_id="j", job_name="n", reason="r").model_dump(mode="json"))
    assert body.hex() == "83a66a6f625f6964a16aa86a6f625f6e616d65a16ea6726561736f6ea172"


def test_a_field_that_this_version_does_not_know_is_ignored() -> None:
    newer = {**ClientRemoved(job_id="j", reason="r").model_dump(mode="json"), "field_of_a_later_version": 1}
    head = [1, "CLIENT_REMOVED", COORDINATOR, "alpha", msgpack.packb(newer)]
    signed = msgpack.packb([*head, KEY.sign(b"fedchord" + msgpack.packb(head))])
    assert open_as(signed) == ClientRemoved(job_id="j", reason="r")


@pytest.mark.parametrize("position", range(5), ids=["version", "kind", "sender", "recipient", "body"])
def test_no_field_can_be_altered(position: int) -> None:
    fields = msgpack.unpackb(seal())
    fields[position] = {int: 1, str: "other", bytes: b"\x80"}[type(fields[position])]
    if position == 0:
        fields[0] = 2
    with pytest.raises((BadSignature, UnknownVersion)):
        open_as(msgpack.packb(fields))


def test_a_message_signed_by_another_key_is_refused() -> None:
    data = Envelope.seal(MESSAGE, sender=COORDINATOR, recipient="alpha", key=SigningKey.generate())
    with pytest.raises(BadSignature):
        open_as(data)


def test_a_message_for_somebody_else_is_refused() -> None:
    with pytest.raises(InvalidMessage, match="meant for 'beta', not for 'alpha'"):
        open_as(seal(recipient="beta"))


def test_a_later_version_is_named() -> None:
    fields = msgpack.unpackb(seal())
    with pytest.raises(UnknownVersion, match="has version 7, this installation speaks version 1"):
        Envelope.read(msgpack.packb([7, *fields[1:], "and a field more"]))


def test_an_unknown_kind_is_named() -> None:
    data = Envelope.seal(
        UpdateReady(job_id="j", round=1, task_id="t", num_examples=1), sender=COORDINATOR, recipient="alpha", key=KEY
    )
    with pytest.raises(UnknownKind, match="'UPDATE_READY' is not known here"):
        open_as(data)


def test_a_wrong_field_is_named() -> None:
    head = [1, "CLIENT_REMOVED", COORDINATOR, "alpha", msgpack.packb({"job_id": 5, "reason": "r"})]
    with pytest.raises(InvalidMessage, match="job_id: Input should be a valid string"):
        open_as(msgpack.packb([*head, KEY.sign(b"fedchord" + msgpack.packb(head))]))


def test_an_oversized_message_is_not_even_read() -> None:
    with pytest.raises(InvalidMessage, match="larger than 4 MiB"):
        Envelope.read(b"\x00" * (MAX_MESSAGE_BYTES + 1))


@given(st.one_of(st.binary(max_size=300), st.text(), st.none(), st.lists(st.integers())))
def test_whatever_is_not_an_envelope_is_refused_as_such(data: object) -> None:
    with pytest.raises(InvalidMessage):
        Envelope.read(data)


@given(st.recursive(st.none() | st.integers(-5, 5) | st.text(max_size=3) | st.binary(max_size=3), st.lists))
def test_hostile_msgpack_is_refused_as_such(value: object) -> None:
    with pytest.raises(InvalidMessage):
        Envelope.read(msgpack.packb(value)).open(ANSWERS, recipient="x", public_key=KEY.public_key)
