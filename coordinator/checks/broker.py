"""Look at the broker: does it answer, may it forget messages, what lies on its queues."""

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError

from common.broker import connect, hide_password, make_coordinator_app
from common.dead_letters import dead_letter_key, read_dead_letters
from common.errors import BrokerUnavailable
from common.queues import COORDINATOR_QUEUE
from common.settings import Settings
from coordinator.checks.finding import Finding, fault, ok, warning
from coordinator.listeners import coordinator_workers
from coordinator.owing import clock

_SLOW_SECONDS = 0.1  # for one question; a round asks a few for each site
_FULL_SHARE = 0.9  # of the memory that it may have
_MANY_ANSWERS = 1000  # wait for a coordinator worker
_MANY_PARTS = 20  # wait for one site


def check_broker(settings: Settings) -> Iterator[Finding]:
    """Look at the server."""
    with closing(connect(settings)) as client:
        seconds = _latency(client)
        info: dict[str, Any] = client.info()
        name = str(info.get("server_name") or "redis").capitalize()
        version = info.get("valkey_version") or info.get("redis_version", "")
        url = hide_password(settings.broker_url.get_secret_value())
        said = f"{name} {version} at {url} answers in {1000 * seconds:.1f} ms."
        if seconds > _SLOW_SECONDS:
            yield warning(
                "broker", said, "Bring broker and coordinator nearer to each other; every round waits for it."
            )
        else:
            yield ok("broker", said)
        yield judge_memory(info)
        yield judge_persistence(info, saves=_saves(client))


def judge_memory(info: Mapping[str, Any]) -> Finding:
    """Tell whether the broker can throw messages away for want of memory, or is about to refuse them."""
    name = "broker: memory"
    policy, most, used = str(info.get("maxmemory_policy", "")), int(info.get("maxmemory", 0)), int(info["used_memory"])
    uses = f"It uses {used / 1e6:.0f} MB"
    mend = "Set `maxmemory-policy noeviction` in its configuration, and CONFIG SET it now."
    if policy != "noeviction":
        said = f"Its maxmemory-policy is {policy or 'unknown'}"
        if most:
            return fault(
                name, f"{said}: when its {most / 1e6:.0f} MB are full, it throws queues and messages away.", mend
            )
        return warning(name, f"{said}; it has no maxmemory, so that nothing is thrown away yet.", mend)
    if most and used > _FULL_SHARE * most:
        mend = "Raise maxmemory, or find out what fills it: `fedchord doctor` lists long queues."
        return warning(name, f"{uses} of {most / 1e6:.0f} MB; when they are full, it takes no message.", mend)
    return ok(name, f"{uses}{f' of {most / 1e6:.0f} MB' if most else ''} and evicts nothing.")


def judge_persistence(info: Mapping[str, Any], *, saves: str | None) -> Finding:
    """Tell whether the queues outlive the broker's restart; `saves` are its save points, None if they are secret."""
    name = "broker: persistence"
    if info.get("aof_last_write_status", "ok") != "ok" or info.get("rdb_last_bgsave_status", "ok") != "ok":
        return fault(
            name, "Its last write to the disk failed; it may refuse messages.", "Look at its log and its disk's space."
        )
    if info.get("aof_enabled"):
        return ok(name, "Its append-only file keeps the queues over a restart.")
    if saves:
        return ok(name, f"Its snapshots ({saves}) keep the queues over a restart, but for the last changes.")
    if saves is None:
        return ok(name, "Whether it takes snapshots it does not tell; its append-only file is off.")
    return warning(
        name,
        "It keeps nothing on disk: a restart empties the queues, and sites are then asked again one by one.",
        "Set `appendonly yes` in its configuration.",
    )


def check_queues(settings: Settings) -> Iterator[Finding]:
    """Look at the queues: who takes from them, how long they are, what was set aside."""
    try:
        client = connect(settings)
    except BrokerUnavailable:  # the broker's own check says so
        yield warning("queues", "Not looked at: the broker does not answer.")
        return
    with closing(client):
        keys = sorted(
            key.decode(errors="replace") for key in client.scan_iter(match="site.*", _type="list", count=1000)
        )
        dead_of_sites = [key for key in keys if key.endswith(dead_letter_key(""))]
        queues = [COORDINATOR_QUEUE, *(key for key in keys if key not in dead_of_sites)]
        lengths = {queue: int(client.llen(queue)) for queue in queues}
        with make_coordinator_app(settings) as app:
            workers = coordinator_workers(app)
        yield judge_workers(workers, lengths[COORDINATOR_QUEUE])
        yield judge_queues(lengths)
        yield from _dead_letters(client, [dead_letter_key(COORDINATOR_QUEUE), *dead_of_sites])


def judge_workers(workers: tuple[str, ...], waiting: int) -> Finding:
    """Tell whether somebody takes the coordinator's messages."""
    name = "coordinator worker"
    if not workers:
        queued = f" (messages on its queue: {waiting})" if waiting else ""
        return fault(
            name,
            f"None answers{queued}.",
            "Start one: `celery -A coordinator worker`, or `fedchord up` for the embedded stack.",
        )
    if waiting > _MANY_ANSWERS:
        return warning(
            name,
            f"Messages heap up for {', '.join(workers)}: {waiting}.",
            "Start another coordinator worker, or raise FEDCHORD_COORDINATOR_THREADS.",
        )
    return ok(name, f"{', '.join(workers)} answers; messages on its queue: {waiting}.")


def judge_queues(lengths: Mapping[str, int]) -> Finding:
    """Tell whether messages heap up for a site."""
    name = "site queues"
    waiting = {queue: count for queue, count in lengths.items() if count and queue != COORDINATOR_QUEUE}
    listed = ", ".join(f"{queue} {count}" for queue, count in sorted(waiting.items())[:10])
    more = f" and {len(waiting) - 10} more" if len(waiting) > 10 else ""
    if any(count > _MANY_PARTS for count in waiting.values()):
        return warning(
            name,
            f"Messages heap up: {listed}{more}.",
            "Start the workers of these sites, or disable the sites: `fedchord sites disable NAME`.",
        )
    return ok(name, f"Messages wait on {listed}{more}." if waiting else "No message waits.")


def _dead_letters(client: Redis, keys: list[str]) -> Iterator[Finding]:
    """Tell of the elements that were no messages and were set aside."""
    found = False
    for key in keys:
        queue = key.removesuffix(dead_letter_key(""))
        if not (count := int(client.llen(key))):
            continue
        found = True
        yield warning(
            "dead letters",
            f"Set aside on {key}: {count}; the newest: {_newest(client, queue)}",
            f"Find out who writes to that queue: `fedchord dead-letters {queue}` lists them, "
            f"`fedchord dead-letters --clear {queue}` forgets them.",
        )
    if not found:
        yield ok("dead letters", "No element of a queue was set aside.")


def _newest(client: Redis, queue: str) -> str:
    for letter in read_dead_letters(client, queue, limit=1):
        return f"{letter.reason} ({clock(letter.at)})." if letter.at else f"{letter.reason}."
    return "it was just forgotten."


def _latency(client: Redis) -> float:
    """Return the median time of an answer in seconds."""
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        client.ping()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _saves(client: Redis) -> str | None:
    with suppress(ResponseError):  # a hosted broker keeps its configuration to itself
        return str(client.config_get("save").get("save") or "")
    return None
