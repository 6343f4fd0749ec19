"""Declare every table once, the coordinator's own included, so that there is one chain of migrations."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
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

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any] | None:
        """Return what reads a stored value: on SQLite faster than the default, for most are empty."""
        return _read_json if dialect.name == "sqlite" else super().result_processor(dialect, coltype)


_decode_json = json.JSONDecoder().raw_decode


def _read_json(text: str | float | None) -> Any:
    if not isinstance(text, str):  # nothing, or a number alone, which SQLite does not keep as text
        return text
    if text == "{}":
        return {}
    return [] if text == "[]" else _decode_json(text)[0]  # we wrote it: no space comes before it, nothing after


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

_IS_FEEDBACKED = text("model_state = 20")  # store.models.ModelState.FEEDBACKED

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
    Column("model_hash", String, nullable=False, index=True),  # digest of a file, or of the index of a job's tensors
    Column("index_hash", String, nullable=True),  # digest of the tensors' index; NULL for an opaque file
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
    Column("created_at", UtcDateTime, nullable=False, default=utc_now),
    Column("origin_node", String, nullable=True),  # the node that a copy came from
    Column("origin_model_id", String, nullable=True),  # its id there
    Column("kept", Boolean, nullable=False, server_default=text("false")),  # with all that it comes from
    Column("expired_at", UtcDateTime, nullable=True),  # since when its bytes may go, see store.retention
    Column("expired_reason", Text, nullable=False, server_default=text("''")),  # why, else empty
    # The newest of a store, by what else is asked for: each is one step in an index, however many there are. What
    # follows `sequence` orders nothing: with it, a row that another condition excludes is passed over in the index.
    Index("ix_model_info_store_sequence", "store", "sequence", "model_state", "model_kind", "round"),
    Index("ix_model_info_store_model_state_sequence", "store", "model_state", "sequence", "model_kind", "round"),
    Index("ix_model_info_store_model_kind_sequence", "store", "model_kind", "sequence", "model_state", "round"),
    Index("ix_model_info_store_round_sequence", "store", "round", "sequence", "model_state", "model_kind"),
    Index("ix_model_info_store_created_at_sequence", "store", "created_at", "sequence"),
    Index("ix_model_info_store_start_datetime_sequence", "store", "start_datetime", "sequence"),
    Index("ix_model_info_job_id_sequence", "job_id", "sequence"),
    Index("ix_model_info_origin", "store", "origin_node", "origin_model_id", unique=True),  # NULLs do not collide
    # The newest that each origin fed back: read from the index alone.
    Index(
        "ix_model_info_feedbacked",
        "store",
        "round",
        "tenant_id",
        "site",
        "origin_node",
        "sequence",
        "model_state",
        sqlite_where=_IS_FEEDBACKED,
        postgresql_where=_IS_FEEDBACKED,
    ),
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
    Column("registered_by", String, nullable=False, server_default=text("''")),  # tenant_id of who registered it
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
    Column("submission_key", String, nullable=True, unique=True, index=True),  # given by who may submit it twice
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
    Column("claims", Integer, nullable=False, default=0, server_default=text("0")),  # how often it was leased
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
    Column("update_norm", Float, nullable=True),  # L2, of update - global model
    Column("global_norm", Float, nullable=True),  # L2, of the global model
    Column("counted_in", String, nullable=True),  # the later round that a late answer counts in; NULL: its own
    UniqueConstraint("round_id", "site"),
    UniqueConstraint("round_id", "position"),
    Index("ix_parts_state_job_id_counted_in", "state", "job_id", "counted_in"),
)

members = Table(
    "members",
    metadata,
    Column("job_id", String, ForeignKey("jobs.job_id"), primary_key=True),
    Column("site", String, primary_key=True),
    Column("failures", Integer, nullable=False),  # rounds in a row without a good answer
    Column("pauses", Integer, nullable=False),  # in a row; each is twice as long as the one before
    Column("paused_until", UtcDateTime, nullable=True),
    Column("reason", Text, nullable=False),  # why it is paused or has left
    Column("has_left", Boolean, nullable=False),  # it does not join again by itself
)

quarantine = Table(
    "quarantine",
    metadata,
    Column("task_id", String, ForeignKey("parts.task_id"), primary_key=True),
    Column("attempt", Integer, nullable=False),  # of the part, when its answer was refused
    Column("state", String, nullable=False),  # held, released, kept, refused or expired
    Column("found", Json, nullable=False),  # for each announced shard {digest, size} of the bytes there, or null
    Column("is_stored", Boolean, nullable=False),  # whether these bytes are blobs, rather than still at their slots
    Column("model_id", String, nullable=True),  # of the model that it became when it was released
    Column("decided_by", String, nullable=False, default=""),
    Column("decided_at", UtcDateTime, nullable=True),
    Column("created_at", UtcDateTime, nullable=False, default=utc_now),
    Index("ix_quarantine_state_created_at", "state", "created_at"),
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

node = Table(
    "node",
    metadata,
    Column("id", String, primary_key=True),  # "self": there is one row
    Column("node_id", String, nullable=False),  # uuid4
)

model_stores = Table(
    "model_stores",
    metadata,
    Column("id", String, primary_key=True),  # uuid4
    Column("name", String, nullable=False, unique=True),  # e.g. "ddc:digits"
    Column("tenant_id", String, nullable=False, index=True),  # who owns it, empty for the operator
    Column("description", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False, default=utc_now),
    Column("updated_at", UtcDateTime, nullable=False, default=utc_now),
)

store_grants = Table(
    "store_grants",
    metadata,
    Column("store_id", String, ForeignKey("model_stores.id"), primary_key=True),
    Column("tenant_id", String, primary_key=True, index=True),
    Column("may_write", Boolean, nullable=False),
)

tenants = Table(
    "tenants",
    metadata,
    Column("tenant_id", String, primary_key=True),  # uuid4
    Column("name", String, nullable=False, unique=True),
    Column("api_key", String, nullable=False, unique=True),
    Column("secret_hash", String, nullable=False),
    Column("is_operator", Boolean, nullable=False),
    Column("enabled", Boolean, nullable=False),
    Column("created_at", UtcDateTime, nullable=False, default=utc_now),
    Column("updated_at", UtcDateTime, nullable=False, default=utc_now),
)

upstreams = Table(
    "upstreams",
    metadata,
    Column("id", String, primary_key=True),  # uuid4
    Column("store", String, nullable=False),  # the model store that feeds it
    Column("url", String, nullable=False),
    Column("api_key", String, nullable=False),
    Column("secret", Text, nullable=False),  # encrypted by store.upstreams.SecretBox
    Column("upstream_store", String, nullable=False),  # the model store there
    Column("alias", String, nullable=False),
    Column("description", Text, nullable=False),
    Column("enabled", Boolean, nullable=False),
    Column("created_at", UtcDateTime, nullable=False, default=utc_now),
    Column("updated_at", UtcDateTime, nullable=False, default=utc_now),
    UniqueConstraint("store", "alias"),
)

received_blobs = Table(
    "received_blobs",
    metadata,
    Column("tenant_id", String, primary_key=True),  # who has proven to have the bytes, by sending them
    Column("digest", String, primary_key=True),
    Column("size", BigInteger, nullable=False),  # bytes
    Column("received_at", UtcDateTime, nullable=False, default=utc_now),
)
