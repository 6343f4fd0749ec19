"""Tell the coordinator every few seconds that the site is alive, from the worker's parent process."""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Collection
from functools import cache
from importlib.metadata import version
from typing import Any

import psutil
import pynvml
from celery import bootsteps
from celery.worker import state
from redis import Redis
from redis.exceptions import RedisError

from common.broker import connect
from common.errors import BrokerUnavailable
from common.heartbeats import Gpu, Heartbeat, remove_heartbeat, write_heartbeat
from common.settings import Settings

logger = logging.getLogger(__name__)

_LIFETIMES = 2.5  # of the time between two; with the coordinator's sweep, an end is noticed before the third is due


class Pulse:
    """The thread that writes the heartbeats; it outlives the broker's absence."""

    def __init__(self, settings: Settings, *, slots: int, working_on: Callable[[], list[str]]) -> None:
        self.boot_id = uuid.uuid4().hex
        self._settings = settings
        self._slots = slots
        self._working_on = working_on
        self._client: Redis | None = None
        self._is_lost = False  # whether the last heartbeat could not be written
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin; the first heartbeat is written at once."""
        self._thread.start()

    def stop(self) -> None:
        """End, and remove the heartbeat, so that nobody waits for this site."""
        self._stopping.set()
        self._thread.join(timeout=2 * self._settings.heartbeat_seconds)
        try:
            if self._client is not None:
                remove_heartbeat(self._client, self._settings.site_name, self.boot_id)
                self._client.close()
        except RedisError as error:  # it vanishes by itself
            logger.warning("Cannot remove the heartbeat: %s.", error, extra={"action": "remove_heartbeat"})

    def beat(self) -> None:
        """Write one heartbeat; raise BrokerUnavailable or RedisError."""
        if self._client is None:
            self._client = connect(self._settings)
        lifetime_seconds = _LIFETIMES * self._settings.heartbeat_seconds
        write_heartbeat(self._client, self._settings.site_name, self.measure(), lifetime_seconds=lifetime_seconds)

    def measure(self) -> Heartbeat:
        """Return what there is to tell now."""
        memory = psutil.virtual_memory()
        working_on = self._working_on()
        return Heartbeat(
            version=version("fedchord"),
            boot_id=self.boot_id,
            at=time.time(),
            cpu_percent=psutil.cpu_percent(),
            memory_total=memory.total,
            memory_available=memory.available,
            disk_free=psutil.disk_usage(str(self._settings.site_folder)).free,
            gpus=read_gpus(),
            slots=self._slots,
            free_slots=max(0, self._slots - len(working_on)),
            working_on=tuple(working_on),
            tasks=tuple(sorted(request.id for request in _snapshot(state.reserved_requests))),
            trainers=tuple(sorted(self._settings.site_trainers)),
        )

    def _run(self) -> None:
        while True:
            try:
                self.beat()
                if self._is_lost:
                    logger.info("The broker is back.", extra={"action": "write_heartbeat"})
                self._is_lost = False
            except (RedisError, BrokerUnavailable, OSError) as error:
                if not self._is_lost:
                    logger.warning("No heartbeat: %s; trying on.", error, extra={"action": "write_heartbeat"})
                self._is_lost = True
            if self._stopping.wait(self._settings.heartbeat_seconds):
                return


def heartbeat_step(settings: Settings) -> type[bootsteps.StartStopStep]:
    """Return the Celery bootstep that runs the site's pulse for as long as its worker takes messages."""

    class HeartbeatStep(bootsteps.StartStopStep):
        requires = ("celery.worker.components:Pool",)  # stops before the pool does, which may still finish a part

        def __init__(self, worker: Any, **options: Any) -> None:
            super().__init__(worker, **options)
            self._pulse = Pulse(settings, slots=worker.concurrency, working_on=describe_active)

        def start(self, worker: Any) -> None:
            self._pulse.start()

        def stop(self, worker: Any) -> None:
            self._pulse.stop()

    return HeartbeatStep


def describe_active() -> list[str]:
    """Return how the senders describe the tasks that the worker's children are at."""
    return sorted(str(request.argsrepr or request.name) for request in _snapshot(state.active_requests))


def _snapshot(requests: Collection[Any]) -> tuple[Any, ...]:
    """Return what is in a set that the worker's main thread changes at the same time."""
    while True:
        try:
            return tuple(requests)
        except RuntimeError:  # it changed its size meanwhile
            continue


def read_gpus() -> tuple[Gpu, ...]:
    """Return the graphics cards; none without NVIDIA's driver."""
    if not _has_nvml():
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(_read_gpu(handle) for handle in handles)
    except pynvml.NVMLError as error:
        logger.debug("Cannot read the graphics cards: %s.", error, extra={"action": "read_gpus"})
        return ()


@cache
def _has_nvml() -> bool:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    return True


def _read_gpu(handle: Any) -> Gpu:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    name = pynvml.nvmlDeviceGetName(handle)
    return Gpu(
        name=name.decode() if isinstance(name, bytes) else name,
        memory_total=memory.total,
        memory_used=memory.used,
        utilization=pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
    )
