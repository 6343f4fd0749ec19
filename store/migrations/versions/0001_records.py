"""Create the tables of models, parties, jobs, rounds, parts, the outbox and the audit."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Written out, not imported from store.tables: a migration stays as it was when the tables go on.
TIME = sa.DateTime(timezone=True)
JSON = sa.JSON(none_as_null=True)
SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Go to this revision."""
    op.create_table(
        "audit",
        sa.Column("id", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("detail", JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_audit_at", "audit", ["at"])
    op.create_table(
        "jobs",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("spec", JSON, nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("num_rounds", sa.Integer(), nullable=False),
        sa.Column("current_round", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.String(), nullable=True),
        sa.Column("sites", JSON, nullable=False),
        sa.Column("submitted_by", sa.String(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("started_at", TIME, nullable=True),
        sa.Column("finished_at", TIME, nullable=True),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("job_id", name="pk_jobs"),
    )
    op.create_index("ix_jobs_created_at", "jobs", ["created_at"])
    op.create_index("ix_jobs_state", "jobs", ["state"])
    op.create_table(
        "model_info",
        sa.Column("sequence", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("store", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("model_kind", sa.String(), nullable=False),
        sa.Column("model_description", sa.Text(), nullable=False),
        sa.Column("model_meta", JSON, nullable=False),
        sa.Column("model_state", sa.Integer(), nullable=False),
        sa.Column("model_hash", sa.String(), nullable=False),
        sa.Column("model_size", sa.BigInteger(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("hop_count", sa.Integer(), nullable=False),
        sa.Column("start_datetime", TIME, nullable=True),
        sa.Column("end_datetime", TIME, nullable=True),
        sa.Column("location", JSON, nullable=True),
        sa.Column("parents", JSON, nullable=False),
        sa.Column("job_id", sa.String(), nullable=True),
        sa.Column("site", sa.String(), nullable=True),
        sa.Column("num_examples", sa.BigInteger(), nullable=True),
        sa.Column("metrics", JSON, nullable=False),
        sa.Column("shards", JSON, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("sequence", name="pk_model_info"),
        sa.UniqueConstraint("model_id", name="uq_model_info_model_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_model_info_created_at", "model_info", ["created_at"])
    op.create_index("ix_model_info_store_model_kind_sequence", "model_info", ["store", "model_kind", "sequence"])
    op.create_index("ix_model_info_store_round_sequence", "model_info", ["store", "round", "sequence"])
    op.create_index("ix_model_info_job_id_sequence", "model_info", ["job_id", "sequence"])
    op.create_index("ix_model_info_store_model_state_sequence", "model_info", ["store", "model_state", "sequence"])
    op.create_index("ix_model_info_store_sequence", "model_info", ["store", "sequence"])
    op.create_table(
        "party_info",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("tenant_name", sa.String(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("hop_count", sa.Integer(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.Column("site", sa.String(), nullable=True),
        sa.Column("public_key", sa.Text(), nullable=True),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_party_info"),
        sa.UniqueConstraint("site", name="uq_party_info_site"),
    )
    op.create_table(
        "rounds",
        sa.Column("round_id", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("group_id", sa.String(), nullable=False),
        sa.Column("body_task_id", sa.String(), nullable=False),
        sa.Column("input_model_id", sa.String(), nullable=True),
        sa.Column("output_model_id", sa.String(), nullable=True),
        sa.Column("deadline_at", TIME, nullable=False),
        sa.Column("published_at", TIME, nullable=True),
        sa.Column("lease_owner", sa.String(), nullable=True),
        sa.Column("lease_until", TIME, nullable=True),
        sa.Column("metrics", JSON, nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("seconds", JSON, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("closed_at", TIME, nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], name="fk_rounds_job_id"),
        sa.PrimaryKeyConstraint("round_id", name="pk_rounds"),
        sa.UniqueConstraint("job_id", "kind", "number", name="uq_rounds_job_id_kind_number"),
    )
    op.create_index("ix_rounds_state_deadline_at", "rounds", ["state", "deadline_at"])
    op.create_table(
        "outbox",
        sa.Column("id", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("site", sa.String(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("sent_at", TIME, nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], name="fk_outbox_job_id"),
        sa.PrimaryKeyConstraint("id", name="pk_outbox"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_outbox_sent_at", "outbox", ["sent_at"])
    op.create_table(
        "parts",
        sa.Column("task_id", sa.String(), nullable=False),
        sa.Column("round_id", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("site", sa.String(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("code", sa.String(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("num_examples", sa.BigInteger(), nullable=True),
        sa.Column("metrics", JSON, nullable=False),
        sa.Column("shards", JSON, nullable=False),
        sa.Column("model_id", sa.String(), nullable=True),
        sa.Column("answered_at", TIME, nullable=True),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.round_id"], name="fk_parts_round_id"),
        sa.PrimaryKeyConstraint("task_id", name="pk_parts"),
        sa.UniqueConstraint("round_id", "position", name="uq_parts_round_id_position"),
        sa.UniqueConstraint("round_id", "site", name="uq_parts_round_id_site"),
    )


def downgrade() -> None:
    """Go back to an empty database."""
    op.drop_table("parts")
    op.drop_table("outbox")
    op.drop_table("rounds")
    op.drop_table("party_info")
    op.drop_table("model_info")
    op.drop_table("jobs")
    op.drop_table("audit")
