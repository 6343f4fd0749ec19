"""A site's heartbeat: a key in the broker that vanishes when the site does."""

import logging
from collections.abc import Iterable

import msgpack
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError
from redis import Redis
from redis.exceptions import RedisError

from common.errors import BrokerUnavailable
from common.queues import heartbeat_key

logger = logging.getLogger(__name__)

_MAX_BYTES = 64 * 1024  # a site writes its own key; more than this is not a heartbeat


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Gpu(_Data):
    """One graphics card."""

    name: str
    memory_total: int  # bytes
    memory_used: int  # bytes
    utilization: int  # percent


class Heartbeat(_Data):
    """What a site tells about itself."""

    version: str  # of FedChord
    boot_id: str  # another one after each start of the site's worker
    at: FiniteFloat  # unix time, seconds, by the site's clock
    cpu_percent: FiniteFloat  # of all processors together, since the heartbeat before
    memory_total: int  # bytes
    memory_available: int  # bytes
    disk_free: int  # bytes, where the site's folder is
    gpus: tuple[Gpu, ...] = ()
    slots: int  # parts that the site works on at once
    free_slots: int
    working_on: tuple[str, ...] = ()  # the parts at work, as their sender describes them
    tasks: tuple[str, ...] = ()  # ids of the tasks in hand: at work, or taken from the queue to be next
    trainers: tuple[str, ...] = ()  # the names on the site's list


def write_heartbeat(client: Redis, site: str, heartbeat: Heartbeat, *, lifetime_seconds: float) -> None:
    """Write the site's heartbeat, to vanish after its lifetime."""
    data = msgpack.packb(heartbeat.model_dump())
    client.set(heartbeat_key(site), data, px=max(1, round(1000 * lifetime_seconds)))


def remove_heartbeat(client: Redis, site: str, boot_id: str) -> None:
    """Remove the site's heartbeat unless it is already that of another start."""
    heartbeat = _parse(client.get(heartbeat_key(site)), site)
    if heartbeat is not None and heartbeat.boot_id == boot_id:
        client.delete(heartbeat_key(site))


def read_heartbeats(client: Redis, sites: Iterable[str]) -> dict[str, Heartbeat]:
    """Return the heartbeats of those sites that are alive; raise BrokerUnavailable."""
    names = list(sites)
    if not names:
        return {}
    try:
        values = client.mget([heartbeat_key(name) for name in names])
    except RedisError as error:
        raise BrokerUnavailable(f"The broker does not answer ({error}); start it and try again.") from error
    parsed = {name: _parse(value, name) for name, value in zip(names, values, strict=True)}
    return {name: heartbeat for name, heartbeat in parsed.items() if heartbeat is not None}


def _parse(data: object, site: str) -> Heartbeat | None:
    if data is None:
        return None
    try:
        if not isinstance(data, bytes) or len(data) > _MAX_BYTES:
            raise ValueError("not the bytes of a heartbeat")
        return Heartbeat.model_validate(msgpack.unpackb(data))
    except (ValueError, ValidationError, msgpack.UnpackException) as error:
        logger.warning(
            "Site %s has an unreadable heartbeat (%s).",
            site,
            type(error).__name__,
            extra={"action": "read_heartbeat", "site": site},
        )
        return None
