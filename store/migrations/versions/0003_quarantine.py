"""Create the table of quarantined updates; measure updates."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Go to this revision."""
    for column in ("update_norm", "global_norm"):
        op.add_column("parts", sa.Column(column, sa.Float(), nullable=True))
    op.create_table(
        "quarantine",
        sa.Column("task_id", sa.String(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("found", sa.JSON(), nullable=False),
        sa.Column("is_stored", sa.Boolean(), nullable=False),
        sa.Column("model_id", sa.String(), nullable=True),
        sa.Column("decided_by", sa.String(), nullable=False),
        sa.Column("decided_at", TIME, nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["task_id"], ["parts.task_id"], name="fk_quarantine_task_id"),
        sa.PrimaryKeyConstraint("task_id", name="pk_quarantine"),
    )
    op.create_index("ix_quarantine_state_created_at", "quarantine", ["state", "created_at"])
    _list_older_ones()


def downgrade() -> None:
    """Go back to revision 0002."""
    op.drop_table("quarantine")
    for column in ("global_norm", "update_norm"):
        op.drop_column("parts", column)


def _list_older_ones() -> None:
    """List what was quarantined before, whose bytes were not kept."""
    op.execute(
        "INSERT INTO quarantine (task_id, attempt, state, found, is_stored, decided_by, created_at) "
        "SELECT task_id, attempt, 'expired', '[]', true, '', COALESCE(answered_at, CURRENT_TIMESTAMP) FROM parts "
        "WHERE state = 'quarantined'"
    )
