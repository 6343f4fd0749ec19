"""Hold a lease on a round while it is aggregated, so that nobody else does it, unless this process dies."""

import logging
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import Unavailable
from coordinator.parts import count_kept
from coordinator.rounds import claim_round, renew_lease
from coordinator.services import Services
from store.database import writing

logger = logging.getLogger(__name__)


@contextmanager
def held_round(services: Services, round_id: str) -> Iterator[str | None]:
    """Claim the round and renew the lease until the block ends; give the owner's name, None if it is not free."""
    owner = secrets.token_hex(8)
    seconds = services.settings.lease_seconds
    with writing(services.engine) as connection:
        claimed = claim_round(connection, round_id, owner, seconds)
        if claimed:
            count_kept(connection, round_id)
    if not claimed:
        yield None
        return
    done = threading.Event()

    def renew() -> None:
        while not done.wait(seconds / 3):
            try:
                with writing(services.engine) as connection:
                    if not renew_lease(connection, round_id, owner, seconds):
                        return
            except Unavailable as error:  # the lease may run out; closing the round will tell
                logger.warning("The lease is not renewed: %s", error, extra={"action": "renew_lease"})

    thread = threading.Thread(target=renew, name=f"lease {round_id}", daemon=True)
    thread.start()
    try:
        yield owner
    finally:
        done.set()
        thread.join()
