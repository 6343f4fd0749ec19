"""A whole edge as one site of a coordinator above it: the centre's part is a job of the edge's own coordinator.

    site_trainers = { digits-mlp = "worker.edge:EdgeTrainer" }        and an edge.toml in the site's data

What the edge gives is the mean of its sites' updates, weighted by their examples, and it counts for as many examples;
so weighted averaging over any number of levels is what it would be over all sites at once. The edge's job has a key of
its own for each part: whoever does the part again takes up the same job.
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import numpy.typing as npt
from pydantic import JsonValue

from common.errors import AccessDenied, Conflict, Declined, FedChordError, JobFailed, NotFound, Unavailable
from store.blobs import disk_errors, hash_open, write_all
from store.client import Api
from store.models import ModelState
from store.tensors import read_tensors
from worker.edge_job import EdgeJob, EdgeRound, read_edge_job
from worker.edge_settings import read_edge_settings
from worker.tensor_file import TensorFile
from worker.trainer import Cancelled, Evaluation, Fit, JobContext, RoundContext, Tensors, Trainer, check_tensors

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_WAIT_SECONDS = 2.0  # the service is asked for so long at a time, and then whether the part is still wanted
_FIRST_PAUSE_SECONDS = 0.1  # while the service is away
_LONGEST_PAUSE_SECONDS = 2.0
_MODEL_KIND = "global"

# What the edge's rounds may take of the centre's deadline, so that the edge has answered before it.
_START_SHARE = 0.2
_ROUNDS_SHARE = 0.7
_LEAST_SECONDS = 0.5
_LONGEST_SECONDS = 24 * 3600.0  # a coordinator takes no longer deadline unless its settings are changed


class EdgeTrainer(Trainer):
    """Train, test and build at an edge's sites, through the edge's HTTP service."""

    def __init__(self, context: JobContext) -> None:
        """Raise Declined unless `edge.toml` in the site's data says how to reach the edge."""
        super().__init__(context)
        self._settings = settings = read_edge_settings(context.data)
        try:
            self._api = Api(
                settings.url,
                api_key=settings.api_key,
                secret=settings.secret.get_secret_value(),
                timeout_seconds=settings.timeout_seconds,
            )
        except FedChordError as error:
            raise Declined(f"This site's edge.toml is not valid: {error.message}") from error
        self._name = context.job_name or context.job_id
        self._store = f"ddc:{self._name}"  # the model store of the edge's job

    def begin_job(self, step: RoundContext, *, build: bool) -> tuple[Tensors | None, int]:
        """Let one of the edge's sites build the model, and count the examples of all of them."""
        job = self._run("start", step, rounds=0, seed=self.context.seed)
        return self._take(job.model_id, step) if build else None, _counted(job, "start").num_examples

    def build(self) -> Tensors:
        """Return the first model, built by one of the edge's sites."""
        tensors, _ = self.begin_job(RoundContext(round=0, seed=self.context.seed), build=True)
        assert tensors is not None
        return tensors

    def num_examples(self) -> int:
        """Return how many training examples the edge's sites have."""
        return self.begin_job(RoundContext(round=0, seed=self.context.seed), build=False)[1]

    def fit(self, tensors: Tensors, step: RoundContext) -> Fit:
        """Train at the edge's sites; return the mean of their updates, for as many examples as they stand for."""
        job = self._run("train", step, tensors, rounds=self._settings.rounds)
        trained = _counted(job, "train")
        return Fit(
            tensors=self._take(job.model_id, step), num_examples=trained.num_examples, metrics=dict(trained.metrics)
        )

    def evaluate(self, tensors: Tensors, step: RoundContext) -> Evaluation:
        """Measure the model at the edge's sites."""
        tested = _counted(self._run("test", step, tensors, rounds=0, test_every=1), "test")
        return Evaluation(num_examples=tested.num_examples, metrics=dict(tested.metrics))

    def moments(self, tensors: Tensors, step: RoundContext) -> Fit:
        """Collect the moments of the weights at the edge's sites; return their means."""
        collected = _counted(self._run("swag", step, tensors, rounds=0, swag=True), "swag")
        return Fit(
            tensors=self._take(collected.output_model_id, step),
            num_examples=collected.num_examples,
            metrics=dict(collected.metrics),
        )

    def finish(self, tensors: Tensors | None, state: str) -> None:
        """Leave the final global model in the edge's model store."""
        if tensors is not None:
            step = RoundContext(round=0, seed=self.context.seed)
            model_id = self._give(tensors, step)
            logger.info(
                "The edge has the final model %s of the job, which is %s.",
                model_id,
                state,
                extra={"action": "finish_edge", "job": self.context.job_id},
            )

    # --- the edge's job ------------------------------------------------------------------------------------------

    def _run(
        self, kind: str, step: RoundContext, tensors: Tensors | None = None, *, seed: int | None = None, **spec: Any
    ) -> EdgeJob:
        """Run a job at the edge to its end, or take up the one that this part has begun before.

        Raise Declined or JobFailed when it does not complete; when the part is not wanted any more the job is aborted.
        """
        begun = time.monotonic()
        if tensors is not None:
            spec["initial_model"] = {"model": self._give(tensors, step)}
        left = None if step.seconds_left is None else step.seconds_left - (time.monotonic() - begun)
        values = self._spec(left, seed=step.seed if seed is None else seed, **spec)
        key = f"{self.context.job_id}.{kind}.{step.round}.{self.context.site}"
        job = self._ask(step, "job.submit", spec=values, key=key)
        extra = {"action": "run_edge_job", "job": self.context.job_id, "edge_job": job.job_id, "round": step.round}
        logger.info("The edge works on job %s for %s %s.", job.job_id, kind, step.round, extra=extra)
        try:
            while not job.is_over:
                step.report(job.fraction, f"job {job.job_id} of the edge")
                job = self._ask(step, "job.get", job_id=job.job_id, wait_seconds=_WAIT_SECONDS)
        except Cancelled as error:
            self._abort(job, error)
            raise
        if job.state == "aborted":
            raise Declined(f"The edge has ended its job {job.job_id}: {job.reason}")
        if job.state == "failed":
            raise JobFailed(f"The edge's job {job.job_id} failed: {job.reason}")
        return job if job.rounds else self._ask(step, "job.get", job_id=job.job_id)  # it was over before we asked

    def _spec(self, seconds_left: float | None, *, rounds: int, test_every: int = 0, **more: Any) -> dict[str, Any]:
        """Return the fields of the edge's job."""
        settings = self._settings
        left = _LONGEST_SECONDS if seconds_left is None else seconds_left
        asks = rounds + (test_every > 0) + bool(more.get("swag"))  # besides the start
        start_share = _START_SHARE if asks else _START_SHARE + _ROUNDS_SHARE
        return {
            "name": self._name,
            "trainer": settings.trainer or self.context.trainer,
            "rounds": rounds,
            "test_every": test_every,
            "min_sites": settings.min_sites,
            "start_deadline_seconds": _deadline(start_share * left),
            "round_deadline_seconds": _deadline(_ROUNDS_SHARE * left / max(1, asks)),
            "config": cast(dict[str, JsonValue], dict(self.context.config)),
            "strategy": settings.strategy,
            **more,
        }

    def _ask(self, step: RoundContext, method: str, **params: Any) -> EdgeJob:
        return read_edge_job(self._patiently(step, partial(self._api.call, method, **params)))

    def _abort(self, job: EdgeJob, reason: Cancelled) -> None:
        extra = {"action": "abort_edge_job", "job": self.context.job_id, "edge_job": job.job_id}
        try:
            self._api.call("job.abort", job_id=job.job_id, reason=f"The centre: {reason.message}")
        except Conflict:  # it has just ended
            return
        except FedChordError as error:  # it ends at its own deadline
            logger.warning("The edge's job %s could not be aborted: %s", job.job_id, error.message, extra=extra)
        else:
            logger.info("Aborted the edge's job %s: %s", job.job_id, reason.message, extra=extra)

    # --- models --------------------------------------------------------------------------------------------------

    def _give(self, tensors: Tensors, step: RoundContext) -> str:
        """Return the id of the model in the edge's model store; it is sent only if the store has not got it."""
        sending = partial(step.report, 0.0, "gives the edge the model")
        file = cast(BinaryIO, TensorFile(check_tensors(tensors), on_read=sending))
        digest = hash_open(file).digest
        known = {"and": [{"=": ["model_hash", digest]}, {"=": ["model_state", int(ModelState.TRANSFERRED)]}]}

        def give() -> str:
            self._api.initialize_model_store(self._store)
            if found := self._api.get_models(self._store, conds=known, limit=1):
                return str(found[0]["model_id"])
            file.seek(0)
            info = self._api.put_model(
                self._store,
                file,
                model_kind=_MODEL_KIND,
                model_description=f"{self._name}: global model from the centre",
                model_meta={"centre_job_id": self.context.job_id, "site": self.context.site},
                model_state=ModelState.TRANSFERRED,
                round=step.round,
            )
            return str(info["model_id"])

        return self._patiently(step, give)

    def _take(self, model_id: str | None, step: RoundContext) -> dict[str, npt.NDArray[Any]]:
        """Return the tensors of a model in the edge's model store; the client has checked their digest."""
        if model_id is None:
            raise Declined("The edge's job has left no model; its coordinator must be upgraded.")
        with disk_errors(self.context.folder):
            self.context.folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self.context.folder, suffix=".safetensors")
        path = Path(name)
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:

                def take() -> None:
                    file.seek(0)
                    file.truncate()
                    for block in self._api.load_model(self._store, model_id):
                        with disk_errors(path.parent):
                            write_all(file, block)
                        step.report(1.0, "takes the edge's model")

                self._patiently(step, take)
            return read_tensors(path)
        finally:
            path.unlink(missing_ok=True)  # it stays mapped for as long as it is needed

    def _patiently(self, step: RoundContext, call: Callable[[], Result]) -> Result:
        """Return what the call returns, and try again while the edge's service is away, but not for ever."""
        pause = _FIRST_PAUSE_SECONDS
        gives_up_at = time.monotonic() + self._settings.patience_seconds
        while True:
            try:
                return call()
            except Unavailable as error:
                if time.monotonic() + pause > gives_up_at:
                    raise
                logger.warning(
                    "The edge's service is away: %s",
                    error.message,
                    extra={"action": "wait_for_edge", "job": self.context.job_id},
                )
                step.report(0.0, "waits for the edge's service")
            except AccessDenied as error:
                raise Declined(
                    f"The edge's service refuses api_key and secret of this site's edge.toml ({error.message})"
                ) from error
            except NotFound as error:  # somebody at the edge has deleted what the part stands on
                raise Declined(f"The edge has not got it any more: {error.message}") from error
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _counted(job: EdgeJob, kind: str) -> EdgeRound:
    """Return the job's last round of the kind; raise Declined if none of the edge's sites took part."""
    round_ = job.last(kind)
    if round_.num_examples == 0:
        raise Declined(f"None of the edge's sites took part in job {job.job_id}, or they have no examples.")
    return round_


def _deadline(seconds: float) -> float:
    return min(max(seconds, _LEAST_SECONDS), _LONGEST_SECONDS)
