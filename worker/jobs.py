"""Keep each job's trainer between rounds, and the folder that is the trainer's own."""

import json
import logging
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.messages import ModelTestRound, SwagRoundStart, TrainingStart, UpdateRoundStart
from store.blobs import disk_errors
from worker.receipts import check_id
from worker.trainer import JobContext, Trainer
from worker.trainers import Trainers

logger = logging.getLogger(__name__)

KEEP_SECONDS = 30 * 24 * 3600  # a job that was not touched for so long will not be told to have ended
_FRESH_SECONDS = 24 * 3600  # how often it is noted that the job goes on

_RECORD = "job.json"  # what is needed to make the job's trainer again
_OWN = "trainer"  # the trainer's own folder

Part = TrainingStart | UpdateRoundStart | ModelTestRound | SwagRoundStart


def prepare_jobs(folder: Path) -> None:
    """Make the folder and forget jobs that have been left long ago."""
    oldest = time.time() - KEEP_SECONDS
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for job in folder.iterdir():
            record = job / _RECORD
            if (record if record.exists() else job).stat().st_mtime < oldest:
                shutil.rmtree(job, ignore_errors=True)


class Jobs:
    """The jobs that this site takes part in.

    A trainer is kept in memory so that it reads its data once; another process of the site, or this one after a
    restart, makes its own. A job is over when its folder is gone, whichever process removed it.
    """

    def __init__(self, *, site: str, data: Path, folder: Path, trainers: Trainers) -> None:
        self._site = site
        self._data = data  # the site's
        self._folder = folder  # one folder in it for each job
        self._trainers = trainers
        self._made: dict[str, Trainer] = {}  # by job

    def trainer(self, part: Part) -> Trainer:
        """Return the trainer of the part's job, made anew when there is none or its config is another one."""
        context = self._context(part.job_id, part.job_name, part.trainer, part.config, part.seed)
        self._made = {job: made for job, made in self._made.items() if self._record(job).exists()}
        made = self._made.get(part.job_id)
        if made is None or replace(made.context, job_name=part.job_name) != context:
            self._write(context)
            made = self._made[part.job_id] = self._trainers.make(context)
        else:
            _keep_fresh(self._record(part.job_id))
        return made

    def recall(self, job_id: str) -> Trainer | None:
        """Return the job's trainer if it has something to do at the job's end."""
        record = self._record(job_id)
        if not record.exists():
            return None
        if job_id in self._made:
            made = self._made[job_id]
            return made if _has_finish(type(made)) else None
        values = json.loads(record.read_text("utf-8"))
        if not _has_finish(self._trainers.load(values["trainer"])):
            return None
        return self._trainers.make(self._context(job_id, **values))

    def forget(self, job_id: str) -> None:
        """Drop the job's trainer and its folder."""
        self._made.pop(job_id, None)
        shutil.rmtree(self._record(job_id).parent, ignore_errors=True)

    def _record(self, job_id: str) -> Path:
        return self._folder / check_id(job_id) / _RECORD

    def _context(self, job_id: str, job_name: str, trainer: str, config: dict[str, Any], seed: int) -> JobContext:
        return JobContext(
            site=self._site,
            job_id=job_id,
            job_name=job_name,
            trainer=trainer,
            config=config,
            seed=seed,
            data=self._data,
            folder=self._record(job_id).with_name(_OWN),
        )

    def _write(self, context: JobContext) -> None:
        record = self._record(context.job_id)
        values = {name: getattr(context, name) for name in ("job_name", "trainer", "config", "seed")}
        with disk_errors(self._folder):
            context.folder.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(values), "utf-8")


def _keep_fresh(record: Path) -> None:
    now = time.time()
    if now - record.stat().st_mtime > _FRESH_SECONDS:
        os.utime(record, (now, now))


def _has_finish(trainer: type[Trainer]) -> bool:
    return trainer.finish is not Trainer.finish
