"""The commands `submit`, `jobs`, `watch` and `abort`."""

from pathlib import Path

import click

from coordinator import submitting
from coordinator.cli.following import check_completed, follow
from coordinator.cli.output import (
    console,
    document,
    json_option,
    metrics_text,
    open_coordinator,
    print_json,
    table,
)
from coordinator.cli.progress_view import main_metric
from coordinator.jobfile import read_job_file
from coordinator.jobs import Job, find_job, find_jobs
from coordinator.progress import JobProgress, job_progress
from coordinator.services import Services
from store.database import reading


@click.command(
    epilog="""\b
Example:
  fedchord submit examples/digits/job.toml --watch"""
)
@click.argument("job_file", type=click.Path(path_type=Path))
@click.option("--watch", is_flag=True, help="Follow the job until it ends; the exit code is then 6 if it fails.")
@json_option
@click.pass_obj
def submit(config: Path | None, job_file: Path, watch: bool, as_json: bool) -> None:
    """Submit a job file.

    Everything that the file names is checked first: fields, sites, trainer, strategy, model.
    """
    spec = read_job_file(job_file)
    with open_coordinator(config) as services:
        job = submitting.submit(services, spec)
        if watch:
            _watch(services, job, as_json=as_json)
            return
    if as_json:
        print_json(_document(job))
    else:
        click.echo(f"Submitted {job.name} as job {job.job_id} to {len(job.sites)} sites.")
        click.echo(f"Follow it with: fedchord watch {job.job_id[:8]}")


@click.command(
    epilog="""\b
Example:
  fedchord jobs
  fedchord jobs 3f9a --json"""
)
@click.argument("job_id", required=False)
@click.option(
    "--limit", type=click.IntRange(1), default=50, show_default=True, help="List at most so many, the newest."
)
@json_option
@click.pass_obj
def jobs(config: Path | None, job_id: str | None, limit: int, as_json: bool) -> None:
    """List the jobs, or show one.

    JOB_ID may be shortened to what is unique.
    """
    with open_coordinator(config, needs_broker=False) as services:
        if job_id is None:
            _list(services, limit, as_json=as_json)
            return
        progress = job_progress(services, job_id)
    if as_json:
        print_json(progress_document(progress))
    else:
        _show(progress)


@click.command(
    epilog="""\b
Example:
  fedchord watch 3f9a"""
)
@click.argument("job_id")
@json_option
@click.pass_obj
def watch(config: Path | None, job_id: str, as_json: bool) -> None:
    """Follow a job until it ends.

    The exit code is 0 if it completes and 6 if it fails or is aborted. Ctrl-C ends the watching, not the job. With
    --json, the job as it ended is printed. JOB_ID may be shortened to what is unique.
    """
    with open_coordinator(config) as services:
        with reading(services.engine) as connection:
            job = find_job(connection, job_id)
        _watch(services, job, as_json=as_json)


@click.command(
    epilog="""\b
Example:
  fedchord abort 3f9a --reason "wrong learning rate" """
)
@click.argument("job_id")
@click.option("--reason", default="by the operator", show_default=True, help="Why; the sites are told.")
@json_option
@click.pass_obj
def abort(config: Path | None, job_id: str, reason: str, as_json: bool) -> None:
    """End a job now.

    Its sites stop working for it; its models stay. JOB_ID may be shortened to what is unique.
    """
    with open_coordinator(config) as services:
        job = submitting.abort(services, job_id, reason)
    if as_json:
        print_json(_document(job))
    else:
        click.echo(f"Aborted {job.name} ({job.job_id}).")


def progress_document(progress: JobProgress) -> dict[str, object]:
    """Return all that is known of a job, as JSON has it."""
    return {
        **_document(progress.job),
        "rounds_done": progress.rounds_done,
        "rounds": [{"round_id": each.round_id, **document(each)} for each in progress.rounds],
        "parts": document(progress.parts),
    }


def _document(job: Job) -> dict[str, object]:
    return {**document(job), "quorum": job.quorum, "model_store": job.model_store}


def _watch(services: Services, job: Job, *, as_json: bool) -> None:
    try:
        progress = follow(services, job.job_id, None if as_json else console())
    except KeyboardInterrupt:
        click.echo(f"\nThe job goes on. To come back: fedchord watch {job.job_id[:8]}", err=True)
        raise
    if as_json:
        print_json(progress_document(progress))
    check_completed(progress)
    if not as_json:
        click.echo(f"Job {job.name} completed. Its model: fedchord models get --job {job.job_id[:8]}")


def _list(services: Services, limit: int, *, as_json: bool) -> None:
    with reading(services.engine) as connection:
        found = find_jobs(connection, limit=limit)
    if as_json:
        print_json([_document(job) for job in found])
        return
    rows = [
        (job.job_id[:8], job.name, job.state, f"{job.current_round}/{job.spec.rounds}", len(job.sites), job.created_at,
         job.reason)
        for job in found
    ]  # fmt: skip
    empty = "There are no jobs; `fedchord submit JOB.toml` submits one."
    console().print(table(["JOB", "NAME", "STATE", "ROUND", "SITES", "SUBMITTED", "REASON"], rows, empty=empty))


def _show(progress: JobProgress) -> None:
    job = progress.job
    facts = {
        "Job": f"{job.name} ({job.job_id})",
        "State": f"{job.state}{f': {job.reason}' if job.reason else ''}",
        "Rounds": f"{progress.rounds_done} of {job.spec.rounds}",
        "Trainer": job.spec.trainer,
        "Strategy": job.spec.strategy.name,
        "Sites": f"{', '.join(job.sites)} (quorum {job.quorum})",
        "Model": job.model_id or "-",
    }
    if (name := main_metric(progress)) is not None:
        facts[name.capitalize()] = f"{progress.metric(name)[-1][1]:.4f}"
    for title, fact in facts.items():
        click.echo(f"{title:<9} {fact}")
    rows = [
        (each.title.removeprefix("the "), each.state, each.seconds.get("collecting"), each.seconds.get("aggregating"),
         metrics_text(each.metrics), each.reason)
        for each in progress.rounds
    ]  # fmt: skip
    out = console()
    out.print()
    columns = ["ROUND", "STATE", "COLLECTING, S", "AGGREGATING, S", "METRICS", "REASON"]
    out.print(table(columns, rows, empty="No round yet."))
    if progress.newest is not None:
        out.print()
        parts = [(part.site, part.state, part.num_examples, part.reason) for part in progress.parts]
        title = progress.newest.title.removeprefix("the ").upper()
        out.print(table(["SITE", title, "EXAMPLES", "REASON"], parts, empty=""))
