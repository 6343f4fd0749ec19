"""Create the tables of model stores, tenants and upstreams; say of models what their tensors and origins are."""

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
WIDENED = {  # index of model_info: its columns before, and those that it gains
    "ix_model_info_store_sequence": (["store", "sequence"], ["model_state", "model_kind", "round"]),
    "ix_model_info_store_model_state_sequence": (["store", "model_state", "sequence"], ["model_kind", "round"]),
    "ix_model_info_store_model_kind_sequence": (["store", "model_kind", "sequence"], ["model_state", "round"]),
    "ix_model_info_store_round_sequence": (["store", "round", "sequence"], ["model_state", "model_kind"]),
}


def upgrade() -> None:
    """Go to this revision."""
    op.create_table(
        "node",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("node_id", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_node"),
    )
    op.create_table(
        "model_stores",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_model_stores"),
        sa.UniqueConstraint("name", name="uq_model_stores_name"),
    )
    op.create_index("ix_model_stores_tenant_id", "model_stores", ["tenant_id"])
    op.create_table(
        "store_grants",
        sa.Column("store_id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("may_write", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["store_id"], ["model_stores.id"], name="fk_store_grants_store_id"),
        sa.PrimaryKeyConstraint("store_id", "tenant_id", name="pk_store_grants"),
    )
    op.create_index("ix_store_grants_tenant_id", "store_grants", ["tenant_id"])
    op.create_table(
        "tenants",
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("api_key", sa.String(), nullable=False),
        sa.Column("secret_hash", sa.String(), nullable=False),
        sa.Column("is_operator", sa.Boolean(), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", name="pk_tenants"),
        sa.UniqueConstraint("name", name="uq_tenants_name"),
        sa.UniqueConstraint("api_key", name="uq_tenants_api_key"),
    )
    op.create_table(
        "upstreams",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("store", sa.String(), nullable=False),
        sa.Column("url", sa.String(), nullable=False),
        sa.Column("api_key", sa.String(), nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("upstream_store", sa.String(), nullable=False),
        sa.Column("alias", sa.String(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_upstreams"),
        sa.UniqueConstraint("store", "alias", name="uq_upstreams_store_alias"),
    )
    op.create_table(
        "received_blobs",
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("received_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "digest", name="pk_received_blobs"),
    )
    op.add_column("party_info", sa.Column("registered_by", sa.String(), nullable=False, server_default=sa.text("''")))
    op.add_column("jobs", sa.Column("submission_key", sa.String(), nullable=True))
    op.create_index("ix_jobs_submission_key", "jobs", ["submission_key"], unique=True)
    _widen_model_info()
    _describe_models()


def downgrade() -> None:
    """Go back to revision 0001."""
    _narrow_model_info()
    op.drop_index("ix_jobs_submission_key", "jobs")
    op.drop_column("jobs", "submission_key")
    op.drop_column("party_info", "registered_by")
    for table in ("received_blobs", "upstreams", "tenants", "store_grants", "model_stores", "node"):
        op.drop_table(table)


def _widen_model_info() -> None:
    for column in ("index_hash", "origin_node", "origin_model_id"):
        op.add_column("model_info", sa.Column(column, sa.String(), nullable=True))
    for name, (columns, more) in WIDENED.items():
        op.drop_index(name, "model_info")
        op.create_index(name, "model_info", columns + more)
    op.create_index("ix_model_info_model_hash", "model_info", ["model_hash"])
    op.drop_index("ix_model_info_created_at", "model_info")
    for column in ("created_at", "start_datetime"):
        op.create_index(f"ix_model_info_store_{column}_sequence", "model_info", ["store", column, "sequence"])
    op.create_index("ix_model_info_origin", "model_info", ["store", "origin_node", "origin_model_id"], unique=True)
    feedbacked = sa.text("model_state = 20")
    op.create_index(
        "ix_model_info_feedbacked",
        "model_info",
        ["store", "round", "tenant_id", "site", "origin_node", "sequence", "model_state"],
        sqlite_where=feedbacked,
        postgresql_where=feedbacked,
    )


def _narrow_model_info() -> None:
    for name in ("feedbacked", "origin", "store_start_datetime_sequence", "store_created_at_sequence", "model_hash"):
        op.drop_index(f"ix_model_info_{name}", "model_info")
    op.create_index("ix_model_info_created_at", "model_info", ["created_at"])
    for name, (columns, _) in WIDENED.items():
        op.drop_index(name, "model_info")
        op.create_index(name, "model_info", columns)
    for column in ("origin_model_id", "origin_node", "index_hash"):
        op.drop_column("model_info", column)


def _describe_models() -> None:
    """Say of the models that there are what is new: all were made by jobs, and named by their index."""
    connection = op.get_bind()
    models = sa.table(
        "model_info",
        sa.column("store", sa.String()),
        sa.column("model_hash", sa.String()),
        sa.column("index_hash", sa.String()),
        sa.column("shards", sa.JSON()),
        sa.column("created_at", TIME),
    )
    has_tensors = sa.cast(models.c.shards, sa.Text()) != "[]"
    connection.execute(sa.update(models).where(has_tensors).values(index_hash=models.c.model_hash))
    stores = sa.table(
        "model_stores",
        *(sa.column(name, sa.String()) for name in ("id", "name", "tenant_id", "description")),
        *(sa.column(name, TIME) for name in ("created_at", "updated_at")),
    )
    first_at = sa.func.min(models.c.created_at, type_=TIME)
    for name, created_at in connection.execute(sa.select(models.c.store, first_at).group_by(models.c.store)).all():
        connection.execute(
            sa.insert(stores).values(
                id=str(uuid.uuid4()),
                name=name,
                tenant_id="",
                description="",
                created_at=created_at,
                updated_at=created_at,
            )
        )
