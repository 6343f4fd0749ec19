"""Decide about a quarantined update: release it or refuse it."""

import logging
from dataclasses import replace

from common.errors import Conflict, InvalidTensors, UpdateRejected
from coordinator.expected import expected_update
from coordinator.gate import Checked, asks_for_update, check_examples, check_stored, describe_update
from coordinator.jobs import get_job, lock_job
from coordinator.parts import RELEASED, Part, find_parts, overrule_part
from coordinator.quarantine import Entry, EntryState, decide, find_entry, is_stored
from coordinator.rounds import Round, get_round, lock_round
from coordinator.services import Services
from coordinator.states import PartState, RoundState
from store.database import reading, writing
from store.garbage import remove_blobs
from store.models import ModelInfo, add_model

logger = logging.getLogger(__name__)

_GOES_ON = (RoundState.OPEN, RoundState.AGGREGATING)


def release(services: Services, task_id: str, *, by: str) -> Entry:
    """Let the update count if its round is still open; otherwise keep it as a model and raise Conflict that says so.

    A person can overrule a bound, not the facts: what is not what the site signed, not finite, or not of the global
    model's shape can never be aggregated, and Conflict says why. To release it again changes nothing.
    """
    with reading(services.engine) as connection:
        entry = find_entry(connection, task_id)
        round_ = get_round(connection, entry.round_id)
        part = next(part for part in find_parts(connection, entry.round_id) if part.task_id == entry.task_id)
        job = get_job(connection, entry.job_id)
    if entry.state is EntryState.RELEASED:
        return entry
    _check_held(entry)
    checked = _check(services, entry, round_, part)
    update: ModelInfo | None = None
    if checked is not None:
        update = describe_update(job, round_, part, checked, entry.num_examples or 0, entry.metrics)
    with writing(services.engine) as connection:
        lock_job(connection, entry.job_id)
        counts = lock_round(connection, entry.round_id) is RoundState.OPEN  # a coordinator cannot claim it meanwhile
        if not counts:
            if update is None:
                raise Conflict(
                    f"{round_.title} of job {job.name} has ended, so the answer of {part.site} cannot count."
                )
            meta = {**update.model_meta, "aggregated": False, "quarantined": entry.reason}
            update = replace(update, model_meta=meta)
        state = EntryState.RELEASED if counts else EntryState.KEPT
        model_id = update.model_id if update is not None else None
        if not decide(connection, entry, state, by, model_id=model_id):
            raise Conflict(f"Somebody else has decided about {entry.task_id}; `fedchord quarantine show` tells what.")
        if counts and not overrule_part(connection, part, PartState.ACCEPTED, code=RELEASED, model_id=model_id):
            raise Conflict(f"The part {entry.task_id} is not quarantined any more; look at it again.")
        if update is not None:
            add_model(connection, update)
        entry = find_entry(connection, entry.task_id)
    # Its part in the chord was completed with the verdict, so there is nothing to send.
    logger.info(
        "%s released the update of site %s in %s.",
        by,
        entry.site,
        round_.title,
        extra={"action": "release_update", "job": entry.job_id, "round": entry.round_id, "site": entry.site},
    )
    if not counts:
        raise Conflict(_kept(entry))
    return entry


def refuse(services: Services, task_id: str, *, by: str) -> Entry:
    """Refuse the update for good: its bytes are removed, its record stays; raise Conflict if it is decided otherwise.

    Bytes that something else needs stay. While the round goes on, another site's answer may just be found to have the
    same bytes, so they are left to the next clean-up.
    """
    with reading(services.engine) as connection:
        entry = find_entry(connection, task_id)
        round_ = get_round(connection, entry.round_id)
        part = next(part for part in find_parts(connection, entry.round_id) if part.task_id == entry.task_id)
    if entry.state is not EntryState.REFUSED:
        _check_held(entry)
        with writing(services.engine) as connection:
            if not decide(connection, entry, EntryState.REFUSED, by):
                raise Conflict(f"Somebody else has decided about {entry.task_id}; look at it again.")
            entry = find_entry(connection, entry.task_id)
    if not entry.is_stored:
        for number in range(len(entry.found)):
            services.blobs.discard(part.slot(number))
    if round_.state not in _GOES_ON:
        remove_blobs(services.engine, services.blobs, [blob.digest for blob in entry.found if blob is not None])
    logger.info(
        "%s refused the update of site %s in %s.",
        by,
        entry.site,
        round_.title,
        extra={"action": "refuse_update", "job": entry.job_id, "round": entry.round_id, "site": entry.site},
    )
    return entry


def _check_held(entry: Entry) -> None:
    if entry.state is EntryState.KEPT:
        raise Conflict(_kept(entry))
    if entry.state is not EntryState.HELD:
        when = f" by {entry.decided_by}" if entry.decided_by else ""
        raise Conflict(f"The update of {entry.task_id} is {entry.state}{when}; that cannot be changed any more.")


def _kept(entry: Entry) -> str:
    return (
        f"The round of {entry.task_id} had ended, so the update does not count: it is kept as model {entry.model_id}, "
        "which is not aggregated."
    )


def _check(services: Services, entry: Entry, round_: Round, part: Part) -> Checked | None:
    """Return the update if it could be aggregated; None if the round asks for none."""
    try:
        check_examples(entry.num_examples or 0)
        if not asks_for_update(services, round_, part, entry.announced):
            return None
        if entry.found != entry.announced:
            raise UpdateRejected("What came is not what the site announced.")
        if lost := [blob for blob in entry.announced if not is_stored(services.blobs, blob)]:
            raise UpdateRejected(f"The bytes of blob {lost[0].digest} are not in the object store.")
        expected = expected_update(services, round_)
        expected.check_size(entry.announced)
        return check_stored(services, entry.announced, expected)
    except (UpdateRejected, InvalidTensors) as error:
        raise Conflict(
            f"The update of {entry.task_id} cannot be aggregated, whoever decides: {error.message}"
        ) from error
