"""Run migrations over the connection that `store.database.upgrade` hands over; Alembic loads this file."""

from alembic import context
from sqlalchemy import Connection

from store.tables import metadata

connection: Connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    render_as_batch=True,  # SQLite alters a table by copying it
)
with context.begin_transaction():
    context.run_migrations()
