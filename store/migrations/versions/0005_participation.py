"""Record how sites take part in a job, where late answers count, and how often a round was claimed."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    op.add_column("rounds", sa.Column("claims", sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.add_column("parts", sa.Column("counted_in", sa.String(), nullable=True))
    op.create_index("ix_parts_state_job_id_counted_in", "parts", ["state", "job_id", "counted_in"])
    op.create_table(
        "members",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("site", sa.String(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("pauses", sa.Integer(), nullable=False),
        sa.Column("paused_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("has_left", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], name="fk_members_job_id"),
        sa.PrimaryKeyConstraint("job_id", "site", name="pk_members"),
    )


def downgrade() -> None:
    """Go back to revision 0004."""
    op.drop_table("members")
    op.drop_index("ix_parts_state_job_id_counted_in", "parts")
    op.drop_column("parts", "counted_in")
    op.drop_column("rounds", "claims")
