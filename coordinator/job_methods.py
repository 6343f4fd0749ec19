"""What can be done with jobs over HTTP: `job.submit`, `job.get`, `job.list`, `job.abort`, for operators only."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from pydantic import JsonValue

from common.errors import AccessDenied, InvalidInput
from coordinator import submitting
from coordinator.jobfile import check_job
from coordinator.jobs import LIVE, Job, JobState, find_jobs, get_job
from coordinator.parts import Part, find_parts
from coordinator.rounds import Round, find_rounds
from coordinator.services import Services
from store.database import reading
from store.tenants import Caller

MAX_WAIT_SECONDS = 30.0  # longer, and proxies on the way give the connection up

_MAX_LISTED = 1000  # jobs, or rounds of one
_FIRST_PAUSE_SECONDS = 0.02
_LONGEST_PAUSE_SECONDS = 0.25
_REASON_CHARACTERS = 2000


class JobMethods:
    """The methods `job.*`; the first parameter of each is who calls."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def by_name(self) -> Mapping[str, Callable[..., object]]:
        """Return the methods as the service lists them."""
        return {"job.submit": self.submit, "job.get": self.get, "job.list": self.list_jobs, "job.abort": self.abort}

    def submit(self, caller: Caller, spec: dict[str, JsonValue], key: str | None = None) -> dict[str, object]:
        """Submit a job, given as the fields of a job file; the same key again is the same job."""
        _check_operator(caller)
        job = submitting.submit(
            self._services, check_job(spec), key=key, submitted_by=caller.tenant_name or caller.tenant_id
        )
        return job_document(job)

    def get(
        self, caller: Caller, job_id: str, wait_seconds: float = 0.0, newest_rounds: int = 100
    ) -> dict[str, object]:
        """Return the job with its newest rounds and their parts; if asked to, wait so long for its end."""
        _check_operator(caller)
        _check_range("wait_seconds", wait_seconds, 0, MAX_WAIT_SECONDS)
        _check_range("newest_rounds", newest_rounds, 0, _MAX_LISTED)
        job = self._wait(job_id, wait_seconds)
        with reading(self._services.engine) as connection:
            rounds = find_rounds(connection, job_id)
            told = rounds[max(0, len(rounds) - newest_rounds) :]
            documents = [round_document(each, find_parts(connection, each.round_id)) for each in told]
        return {**job_document(job), "rounds": documents}

    def list_jobs(
        self,
        caller: Caller,
        state: Literal["submitted", "running", "completed", "failed", "aborted"] | None = None,
        limit: int = 50,
    ) -> list[dict[str, object]]:
        """Return the newest jobs, of one state if it is named, without their rounds."""
        _check_operator(caller)
        _check_range("limit", limit, 1, _MAX_LISTED)
        with reading(self._services.engine) as connection:
            found = find_jobs(connection, states=() if state is None else (JobState(state),), limit=limit)
        return [job_document(job) for job in found]

    def abort(self, caller: Caller, job_id: str, reason: str = "by the operator") -> dict[str, object]:
        """End a job now and return it; its sites stop working for it, its models stay."""
        _check_operator(caller)
        _check_range("the length of reason", len(reason), 0, _REASON_CHARACTERS)
        with reading(self._services.engine) as connection:
            job = get_job(connection, job_id)  # the whole id: nobody else's job is meant
        return job_document(submitting.abort(self._services, job.job_id, reason))

    def _wait(self, job_id: str, seconds: float) -> Job:
        """Return the job when it has ended, or as it is after so many seconds."""
        deadline = time.monotonic() + seconds
        pause = _FIRST_PAUSE_SECONDS
        while True:
            with reading(self._services.engine) as connection:
                job = get_job(connection, job_id)
            left = deadline - time.monotonic()
            if job.state not in LIVE or left <= 0:
                return job
            time.sleep(min(pause, left))
            pause = min(1.2 * pause, _LONGEST_PAUSE_SECONDS)


def job_document(job: Job) -> dict[str, object]:
    """Return what is told of a job."""
    return {
        "job_id": job.job_id,
        "name": job.name,
        "state": job.state.value,
        "reason": job.reason,
        "model_store_ddc": job.model_store,
        "model_id": job.model_id,
        "sites": list(job.sites),
        "quorum": job.quorum,
        "num_rounds": job.spec.rounds,
        "current_round": job.current_round,
        "submitted_by": job.submitted_by,
        "key": job.submission_key,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
    }


def round_document(round_: Round, parts: Sequence[Part]) -> dict[str, object]:
    """Return what is told of a round and its parts."""
    return {
        "kind": round_.kind.value,
        "number": round_.number,
        "state": round_.state.value,
        "reason": round_.reason,
        "metrics": round_.metrics,
        "input_model_id": round_.input_model_id,
        "output_model_id": round_.output_model_id,
        "created_at": round_.created_at,
        "closed_at": round_.closed_at,
        "parts": [
            {
                "site": part.site,
                "state": part.state.value,
                "reason": part.reason,
                "num_examples": part.num_examples,
                "metrics": part.metrics,
            }
            for part in parts
        ],
    }


def _check_operator(caller: Caller) -> None:
    if not caller.is_operator:
        raise AccessDenied("Jobs are the operator's; use the API key and secret of an operator.")


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:  # NaN is in no range
        raise InvalidInput(f"{name} is {value:g}; it may be {least:g} to {most:g}.")
