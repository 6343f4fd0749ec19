"""Run blocking calls beside the event loop, in threads that never keep the process from ending.

A call to an object store that hangs may take a minute. The threads of `asyncio.to_thread` and of anyio are waited for
when the interpreter ends; ours are daemons, so that SIGTERM ends the service within seconds.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")

_Job = tuple[asyncio.AbstractEventLoop, asyncio.Future[Any], Callable[[], Any]]


class Threads:
    """A limited number of threads, each started when it is first needed."""

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._started = 0
        self._idle = 0  # threads that wait, less the calls that are on their way to them; the lock guards both
        self._lock = threading.Lock()

    async def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Return what the function returns, or raise what it raises; when this is cancelled, the function goes on."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._jobs.put((loop, future, lambda: function(*arguments)))
        with self._lock:
            self._idle -= 1
            if self._idle < 0 and self._started < self._limit:
                self._started += 1
                self._idle += 1
                threading.Thread(target=self._work, name=f"{self._name}-{self._started}", daemon=True).start()
        return await future

    def _work(self) -> None:
        while True:
            loop, future, call = self._jobs.get()
            result: Any = None
            failure: BaseException | None = None
            try:
                result = call()
            except BaseException as error:  # whatever it is, it is the caller's
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_settle, future, result, failure)
            del loop, future, call, result, failure  # an idle thread holds no block in memory
            with self._lock:
                self._idle += 1


def _settle(future: asyncio.Future[Any], result: object, failure: BaseException | None) -> None:
    if future.done():  # cancelled
        return
    if failure is None:
        future.set_result(result)
    else:
        future.set_exception(failure)
