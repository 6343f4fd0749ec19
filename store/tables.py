"""Declare every table once, the coordinator's own included, so that there is one chain of migrations."""

import json
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)


def utc_now() -> datetime:
    """Return the time now, aware of its zone."""
    return datetime.now(UTC)


class UtcDateTime(TypeDecorator[datetime]):
    """Hold times in UTC, always aware of it; SQLite, which knows no zones, stores them without."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Turn an aware time into what the database stores; raise ValueError for a naive one."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"The time {value} has no zone; use datetime.now(UTC).")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Turn what the database stores into an aware time in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Json(TypeDecorator[Any]):
    """Hold JSON as text, None as NULL.

    Not PostgreSQL's jsonb, which would reorder keys and turn 1e22 into an integer.
    """

    impl = JSON(none_as_null=True)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        """Raise ValueError or TypeError for what is not JSON, NaN included, which SQLite would let pass."""
        json.dumps(value, allow_nan=False)
        return value


# SQLite counts up by itself only in a primary key declared as INTEGER; its integers have 64 bits anyway.
_Sequence = BigInteger().with_variant(Integer(), "sqlite")

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    }
)

model_info = Table(
    "model_info",
    metadata,
    Column("sequence", _Sequence, primary_key=True, autoincrement=True),  # orders "latest" without ties
    Column("model_id", String, nullable=False, unique=True),  # uuid4
    Column("store", String, nullable=False),  # the model store's name, e.g. "ddc:digits"
    Column("tenant_id", String, nullable=False),
    Column("model_kind", String, nullable=False),
    Column("model_description", Text, nullable=False),
    Column("model_meta", Json, nullable=False),
    Column("model_state", Integer, nullable=False),  # store.models.ModelState
    Column("model_hash", String, nullable=False),  # digest of the tensors' index, or of an opaque file
    Column("model_size", BigInteger, nullable=False),  # bytes of all shards
    Column("round", Integer, nullable=False),
    Column("hop_count", Integer, nullable=False),
    Column("start_datetime", UtcDateTime, nullable=True),
    Column("end_datetime", UtcDateTime, nullable=True),
    Column("location", Json, nullable=True),
    Column("parents", Json, nullable=False),  # list of model_id
    Column("job_id", String, nullable=True),
    Column("site", String, nullable=True),
    Column("num_examples", BigInteger, nullable=True),
    Column("metrics", Json, nullable=False),
    Column("shards", Json, nullable=False),  # list of {digest, size}
    Column("created_at", UtcDateTime, nullable=False, default=utc_now, index=True),
    # The newest of a store, by what else is asked for: each is one step in an index, however many there are.
    Index("ix_model_info_store_sequence", "store", "sequence"),
    Index("ix_model_info_store_model_state_sequence", "store", "model_state", "sequence"),
    Index("ix_model_info_store_model_kind_sequence", "store", "model_kind", "sequence"),
    Index("ix_model_info_store_round_sequence", "store", "round", "sequence"),
    Index("ix_model_info_job_id_sequence", "job_id", "sequence"),
    sqlite_autoincrement=True,  # a deleted model's number is not given out again
)

party_info = Table(
    "party_info",
    metadata,
    Column("id", String, primary_key=True),  # uuid4
    Column("tenant_id", String, nullable=False),
    Column("tenant_name", String, nullable=False),
    Column("description", Text, nullable=False),
    Column("hop_count", Integer, nullable=False),
    Column("created_at", UtcDateTime, nullable=False, default=utc_now),
    Column("updated_at", UtcDateTime, nullable=False, default=utc_now),
    Column("site", String, nullable=True, unique=True),  # NULL: a party that is not a site
    Column("public_key", Text, nullable=True),
    Column("enabled", Boolean, nullable=False),
    Column("reason", Text, nullable=False),  # why it is disabled, else empty
)

jobs = Table(
    "jobs",
    metadata,
    Column("job_id", String, primary_key=True),
    Column("name", String, nullable=False),
    Column("state", String, nullable=False),
    Column("spec", Json, nullable=False),  # the validated job file
    Column("reason", Text, nullable=False, default=""),
    Column("num_rounds", Integer, nullable=False),
    Column("current_round", Integer, nullable=False, default=0),
    Column("model_id", String, nullable=True),  # the current global model
    Column("sites", Json, nullable=False),  # list of site names
    Column("submitted_by", String, nullable=False, default=""),
    Column("created_at", UtcDateTime, nullable=False, default=utc_now, index=True),
    Column("started_at", UtcDateTime, nullable=True),
    Column("finished_at", UtcDateTime, nullable=True),
    Column("updated_at", UtcDateTime, nullable=False, default=utc_now),
    Index("ix_jobs_state", "state"),
)

rounds = Table(
    "rounds",
    metadata,
    Column("round_id", String, primary_key=True),
    Column("job_id", String, ForeignKey("jobs.job_id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("kind", String, nullable=False),  # start, train, test or swag
    Column("state", String, nullable=False),
    Column("group_id", String, nullable=False),  # of the chord's header
    Column("body_task_id", String, nullable=False),  # of the chord's callback
    Column("input_model_id", String, nullable=True),
    Column("output_model_id", String, nullable=True),
    Column("deadline_at", UtcDateTime, nullable=False),
    Column("published_at", UtcDateTime, nullable=True),  # NULL: planned, perhaps not published
    Column("lease_owner", String, nullable=True),  # the process that is aggregating
    Column("lease_until", UtcDateTime, nullable=True),
    Column("metrics", Json, nullable=False, default=dict),
    Column("reason", Text, nullable=False, default=""),
    Column("seconds", Json, nullable=False, default=dict),  # timings by name
    Column("created_at", UtcDateTime, nullable=False, default=utc_now),
    Column("closed_at", UtcDateTime, nullable=True),
    UniqueConstraint("job_id", "kind", "number"),
    Index("ix_rounds_state_deadline_at", "state", "deadline_at"),  # what the sweeper asks for
)

parts = Table(
    "parts",
    metadata,
    Column("task_id", String, primary_key=True),
    Column("round_id", String, ForeignKey("rounds.round_id"), nullable=False),  # indexed by its UNIQUEs
    Column("job_id", String, nullable=False),
    Column("site", String, nullable=False),
    Column("position", Integer, nullable=False),  # in the chord's header
    Column("attempt", Integer, nullable=False, default=1),
    Column("state", String, nullable=False),
    Column("code", String, nullable=True),
    Column("reason", Text, nullable=False, default=""),
    Column("num_examples", BigInteger, nullable=True),
    Column("metrics", Json, nullable=False, default=dict),
    Column("shards", Json, nullable=False, default=list),  # list of {digest, size}
    Column("model_id", String, nullable=True),  # the update's model_info
    Column("answered_at", UtcDateTime, nullable=True),
    UniqueConstraint("round_id", "site"),
    UniqueConstraint("round_id", "position"),
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", _Sequence, primary_key=True, autoincrement=True),
    Column("kind", String, nullable=False),  # of a message that asks for no answer
    Column("job_id", String, ForeignKey("jobs.job_id"), nullable=False),
    Column("site", String, nullable=False),
    Column("reason", Text, nullable=False, default=""),
    Column("created_at", UtcDateTime, nullable=False, default=utc_now),
    Column("sent_at", UtcDateTime, nullable=True),  # NULL: recorded, perhaps not sent
    Index("ix_outbox_sent_at", "sent_at"),
    sqlite_autoincrement=True,
)

audit = Table(
    "audit",
    metadata,
    Column("id", _Sequence, primary_key=True, autoincrement=True),
    Column("at", UtcDateTime, nullable=False, default=utc_now, index=True),
    Column("actor", String, nullable=False),
    Column("action", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("detail", Json, nullable=False, default=dict),
    sqlite_autoincrement=True,
)
