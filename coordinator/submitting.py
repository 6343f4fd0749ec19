"""Take a job in: check everything it names first, then record it and send it on its way."""

import getpass
import json
import logging
import re
from pathlib import Path

import msgpack
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from common.errors import (
    BrokerUnavailable,
    Conflict,
    InvalidInput,
    InvalidJobFile,
    InvalidSettings,
    InvalidTensors,
    UpdateRejected,
)
from common.heartbeats import read_heartbeats
from common.queues import COORDINATOR_QUEUE, CoordinatorTask, cancel_key
from coordinator.choosing import BUILT_IN, load_chooser
from coordinator.dispatch import send_notices
from coordinator.gate import check_values
from coordinator.jobfile import JobSpec
from coordinator.jobs import Job, JobState, add_job, find_job, find_submission, get_job, new_job
from coordinator.model_weights import model_weights
from coordinator.parts import end_parts
from coordinator.planning import finish
from coordinator.rounds import abort_rounds
from coordinator.services import Services
from coordinator.states import OWING
from store.database import reading, writing
from store.expiry import check_not_expired
from store.index import Weights
from store.model_stores import add_store
from store.models import ModelInfo, ModelState, add_model, get_model
from store.parties import sites as enrolled_sites
from store.tensors import read_header, read_tensors
from store.weights import register_shards, store_weights

logger = logging.getLogger(__name__)

_KEY = re.compile(r"[A-Za-z0-9._:-]{1,200}")
_MAX_CONFIG_BYTES = 2**20  # a message takes 4 MiB, its references included
_CANCEL_SECONDS = 7 * 24 * 3600  # how long a site that is away can still learn of an abort


def submit(services: Services, spec: JobSpec, *, key: str | None = None, submitted_by: str | None = None) -> Job:
    """Record the job and tell a coordinator worker; raise InvalidJobFile or NotFound before anything has changed.

    To submit with the same key again returns the job that there is, whatever became of it, so that it can be repeated
    when the first answer was lost. Raise Conflict when the job's model store is another tenant's.
    """
    if key is not None:
        with reading(services.engine) as connection:
            known = find_submission(connection, _check_key(key))
        if known is not None:
            return known
    _check_config(spec)
    _check_deadline(services, spec)
    _check_chooser(services, spec)
    sites = _check_sites(services, spec)
    quorum = spec.quorum(len(sites))
    if quorum > len(sites):
        raise InvalidJobFile(f"min_sites: the quorum is {quorum}, but the job has {len(sites)} sites.")
    _check_trainer(services, spec, sites, quorum)
    services.blobs.check()
    model = _initial_model(services, spec)
    job = new_job(
        spec,
        sites=sites,
        model_id=model.model_id if model else None,
        submitted_by=_user() if submitted_by is None else submitted_by,
        submission_key=key,
    )
    with writing(services.engine) as connection:
        recorded = add_job(connection, job)
        if recorded is not job:
            return recorded
        add_store(connection, job.model_store)
        if model is not None and spec.initial_model.file is not None:
            add_model(connection, model)
        elif model is not None:
            # from here on it neither is deleted nor expires while the job goes on from it
            check_not_expired(get_model(connection, model.model_id))
    try:
        services.app.send_task(
            CoordinatorTask.ADVANCE.value,
            args=[job.job_id],
            queue=COORDINATOR_QUEUE,
            argsrepr=job.name,
            ignore_result=True,
        )
    except KombuError as error:  # it was there a moment ago; the sweeper starts the job when it is back
        logger.warning("The job waits for the broker: %s", error, extra={"action": "submit_waits", "job": job.job_id})
    return job


def abort(services: Services, job_id: str, reason: str) -> Job:
    """End the job now: its rounds are aborted, its sites stop working for it; raise Conflict if it has ended."""
    with reading(services.engine) as connection:
        job = find_job(connection, job_id)
    with writing(services.engine) as connection:
        if not finish(connection, job, JobState.ABORTED, reason):
            raise Conflict(f"Job {job.name} ({job.job_id}) has ended: it is {get_job(connection, job.job_id).state}.")
        abort_rounds(connection, job.job_id, reason)
        end_parts(connection, job.job_id, OWING, reason)
    try:
        for site in job.all_sites:
            services.broker.set(cancel_key(site, job.job_id), reason, ex=_CANCEL_SECONDS)
        send_notices(services)
    except (RedisError, BrokerUnavailable) as error:
        raise BrokerUnavailable(
            f"The job is aborted, but its sites could not be told ({error}); they stop at their round's deadline."
        ) from error
    with reading(services.engine) as connection:
        return get_job(connection, job.job_id)


def _check_config(spec: JobSpec) -> None:
    """Refuse what TOML can say and the records or a message cannot."""
    try:
        json.dumps(spec.model_dump(), allow_nan=False, default=str)
        size = len(msgpack.packb(spec.config))
    except (ValueError, OverflowError, RecursionError) as error:
        raise InvalidJobFile(
            f"config or strategy: a value cannot be sent ({error}); use finite numbers, and integers of 64 bits."
        ) from error
    if size > _MAX_CONFIG_BYTES:
        raise InvalidJobFile(f"config: it has {size} bytes and may have {_MAX_CONFIG_BYTES}; put data at the sites.")


def _check_deadline(services: Services, spec: JobSpec) -> None:
    """Refuse a deadline that the references to the model and for the updates would not live to see."""
    longest = services.settings.reference_seconds
    seconds = {
        "round_deadline_seconds": spec.longest_seconds(start=False, train=True),
        "start_deadline_seconds": spec.longest_seconds(start=True, train=False),
    }
    if wrong := [name for name in seconds if seconds[name] > longest]:
        raise InvalidJobFile(
            f"{wrong[0]}: it is {seconds[wrong[0]]:.0f} s, with the extension and the time for late answers, "
            f"but references to the store live for {longest} s; shorten it, or raise FEDCHORD_REFERENCE_SECONDS for "
            "the coordinator (a week at the most)."
        )


def _check_chooser(services: Services, spec: JobSpec) -> None:
    if (name := spec.participation.choose) not in BUILT_IN:
        try:
            load_chooser(name, services.settings.choosers)
        except InvalidSettings as error:
            raise InvalidJobFile(error.message) from error


def _check_sites(services: Services, spec: JobSpec) -> tuple[str, ...]:
    with reading(services.engine) as connection:
        known = {party.site: party for party in enrolled_sites(connection) if party.site}
    if spec.sites is None:
        chosen = sorted(name for name, party in known.items() if party.enabled)
        if not chosen:
            raise InvalidJobFile("sites: no site is enrolled and enabled; enroll one with `fedchord sites add`.")
        return tuple(chosen)
    if unknown := sorted(set(spec.sites) - known.keys()):
        raise InvalidJobFile(f"sites: no site {unknown[0]!r}; enrolled are {', '.join(sorted(known)) or 'none'}.")
    if disabled := [name for name in spec.sites if not known[name].enabled]:
        raise InvalidJobFile(
            f"sites: site {disabled[0]!r} is disabled ({known[disabled[0]].reason}); "
            f"`fedchord sites enable {disabled[0]}` takes it back."
        )
    return tuple(sorted(spec.sites))


def _check_trainer(services: Services, spec: JobSpec, sites: tuple[str, ...], quorum: int) -> None:
    """Refuse a trainer that too many of the sites that are alive do not offer; those that are away are not known."""
    heartbeats = read_heartbeats(services.broker, sites)
    lacking = sorted(name for name, heartbeat in heartbeats.items() if spec.trainer not in heartbeat.trainers)
    if len(sites) - len(lacking) < quorum:
        offered = sorted({trainer for heartbeat in heartbeats.values() for trainer in heartbeat.trainers})
        raise InvalidJobFile(
            f"trainer: {spec.trainer!r} is not on the list of {', '.join(lacking[:5])}"
            f"{' and others' if len(lacking) > 5 else ''}; offered are {', '.join(offered) or 'none'}."
        )


def _initial_model(services: Services, spec: JobSpec) -> ModelInfo | None:
    source = spec.initial_model
    if source.model is not None:
        with reading(services.engine) as connection:
            model = get_model(connection, source.model)
        check_not_expired(model)
        _check_stored(services, model)
        return model
    if source.file is None:
        return None
    weights = _import_file(services, source.file)
    return ModelInfo(
        store=f"ddc:{spec.name}",
        model_kind="initial",
        model_description=f"{spec.name}: initial model from {source.file.name}",
        model_state=ModelState.CREATED,
        model_hash=weights.index.digest,
        index_hash=weights.index.digest,
        model_size=weights.size,
        shards=weights.shards,
    )


def _check_stored(services: Services, model: ModelInfo) -> None:
    """Refuse a stored model that no site could train; what a job made has passed the gate, what was put has not."""
    try:
        weights = model_weights(services.blobs, model)
        if not weights.schema:
            raise InvalidTensors(f"Model {model.model_id} holds no tensors.")
        if model.job_id is None:
            register_shards(services.blobs, weights.shards, look=check_values)
    except InvalidTensors as error:
        raise InvalidJobFile(f"initial_model.model: {error.message}") from error
    except UpdateRejected as error:
        raise InvalidJobFile(f"initial_model.model: {model.model_id} cannot be trained: {error.message}") from error


def _import_file(services: Services, file: Path) -> Weights:
    try:
        tensors = read_tensors(file)
    except InvalidTensors as error:
        raise InvalidJobFile(f"initial_model.file: {file} is not valid safetensors: {error.message}") from error
    if not tensors:
        raise InvalidJobFile(f"initial_model.file: {file} holds no tensors.")
    with file.open("rb", buffering=0) as opened:
        try:
            check_values(opened, read_header(opened, file.stat().st_size))
        except UpdateRejected as error:  # every update made from it would be refused
            raise InvalidJobFile(f"initial_model.file: {file} cannot be trained: {error.message}") from error
    return store_weights(services.blobs, tensors, services.settings.shard_bytes)


def _check_key(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise InvalidInput(f"The key {key[:80]!r} is not valid: use 1 to 200 letters, digits and . _ : - characters.")
    return key


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no name for this user id, as in a container
        return ""
