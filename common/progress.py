"""How far a site is with a part: a key in the broker that vanishes soon after the last sign of progress."""

import logging
from collections.abc import Iterable
from typing import Annotated

import msgpack
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from redis import Redis
from redis.exceptions import RedisError

from common.errors import BrokerUnavailable
from common.queues import progress_key

logger = logging.getLogger(__name__)

MAX_TEXT_CHARACTERS = 200
_MAX_BYTES = 4 * 1024  # a site writes its own key; more than this is not a report


class ProgressReport(BaseModel):
    """What a site tells of a part that it works on."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    task_id: str
    fraction: Annotated[FiniteFloat, Field(ge=0, le=1)]  # of the training; transfers before it are 0, after it 1
    text: str = Field("", max_length=MAX_TEXT_CHARACTERS)  # what is being done
    at: FiniteFloat  # unix time, seconds, by the site's clock


def write_progress(client: Redis, report: ProgressReport, site: str, lifetime_seconds: float) -> None:
    """Write the report, to vanish after its lifetime."""
    data = msgpack.packb(report.model_dump())
    client.set(progress_key(site, report.task_id), data, px=max(1, round(1000 * lifetime_seconds)))


def remove_progress(client: Redis, site: str, task_id: str) -> None:
    """Remove the report of a part that is answered."""
    client.delete(progress_key(site, task_id))


def read_progress(client: Redis, parts: Iterable[tuple[str, str]]) -> dict[str, ProgressReport]:
    """Return the reports there are, by task id, for sites and task ids; raise BrokerUnavailable."""
    asked = list(parts)
    if not asked:
        return {}
    try:
        values = client.mget([progress_key(site, task_id) for site, task_id in asked])
    except RedisError as error:
        raise BrokerUnavailable(f"The broker does not answer ({error}); start it and try again.") from error
    parsed = {task_id: _parse(value, site, task_id) for (site, task_id), value in zip(asked, values, strict=True)}
    return {task_id: report for task_id, report in parsed.items() if report is not None}


def _parse(data: object, site: str, task_id: str) -> ProgressReport | None:
    if data is None:
        return None
    try:
        if not isinstance(data, bytes) or len(data) > _MAX_BYTES:
            raise ValueError("not the bytes of a report")
        report = ProgressReport.model_validate(msgpack.unpackb(data))
        if report.task_id != task_id:
            raise ValueError("the report of another part")
    except (ValueError, ValidationError, msgpack.UnpackException) as error:
        logger.warning(
            "Site %s has an unreadable progress report (%s).",
            site,
            type(error).__name__,
            extra={"action": "read_progress", "site": site, "task": task_id},
        )
        return None
    return report
