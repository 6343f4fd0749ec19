# mypy: disable-error-code="misc,no-untyped-call"
# (Celery's stubs know its Redis backend only in part)
"""Celery's result backend, as far as a coordinator needs one: it counts the parts of chords."""

from typing import Any

from celery.backends.redis import RedisBackend


class ChordBackend(RedisBackend):
    """Count chords, and wait for no result.

    Celery subscribes to the result of each task of a group, in case that somebody asks for it. Here nobody does: the
    subscriptions cost the round time, and what the broker tells of them would never be read.
    """

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Take no notice of a task that is about to be sent."""

    def add_pending_result(self, result: Any, weak: bool = False, start_drainer: bool = True) -> Any:
        """Take no notice of a task that was sent."""
        return result

    def remove_pending_result(self, result: Any) -> Any:
        """Take no notice of a result that nobody holds any more."""
        return result
