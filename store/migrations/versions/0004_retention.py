"""Say of models which are kept, and which have expired."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    op.add_column("model_info", sa.Column("kept", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.add_column("model_info", sa.Column("expired_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("model_info", sa.Column("expired_reason", sa.Text(), server_default=sa.text("''"), nullable=False))


def downgrade() -> None:
    """Go back to revision 0003."""
    for column in ("expired_reason", "expired_at", "kept"):
        op.drop_column("model_info", column)
