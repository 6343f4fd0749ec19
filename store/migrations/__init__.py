"""The chain of migrations of the database, in `versions/`; to add one, add its file and set HEAD to it."""

import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection

if TYPE_CHECKING:
    from alembic.config import Config

# Alembic is imported where it is used: most processes find the database up to date and never need it.

logger = logging.getLogger(__name__)

_migrating = threading.Lock()  # Alembic changes one database at a time in a process

HEAD = "0005"  # the newest revision


def migration_config(connection: Connection | None = None) -> "Config":
    """Return Alembic's configuration, for migrations over the given connection."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def is_known(revision: str) -> bool:
    """Tell whether the revision is one of ours, rather than one of a newer FedChord."""
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory.from_config(migration_config())
    return any(script.revision == revision for script in scripts.walk_revisions())


def migrate(connection: Connection) -> None:
    """Run the missing migrations inside the connection's transaction."""
    from alembic import command

    with _migrating:
        command.upgrade(migration_config(connection), "head")
    logger.info("Brought the database to revision %s.", HEAD, extra={"action": "database.upgraded"})
