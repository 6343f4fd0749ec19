"""The command `why`."""

from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import click

from common.broker import make_coordinator_app
from common.settings import Settings
from coordinator.checks.limit import within
from coordinator.cli.output import ago, coordinator_settings, json_option, print_json
from coordinator.owing import clock
from coordinator.situation import Situation, gather
from coordinator.why import Explanation, explain
from store.database import open_database, upgrade
from store.opening import open_blob_store

_STORE_SECONDS = 5.0  # what takes longer is away


@click.command(
    epilog="""\b
Example:
  fedchord why 3f9a"""
)
@click.argument("job_id")
@json_option
@click.pass_obj
def why(config: Path | None, job_id: str, as_json: bool) -> None:
    """Say what a job waits for, since when and until when.

    Also says what you can do about it. Only the database has to be there: a broker, a coordinator worker or an object
    store that does not answer is part of what is told. JOB_ID may be shortened to what is unique.
    """
    settings = coordinator_settings(config)
    situation = _gather(settings, job_id)
    explanation = explain(situation)
    if as_json:
        job = situation.job
        print_json({"job_id": job.job_id, "name": job.name, "state": job.state, **vars(explanation)})
    else:
        _print(explanation)


def _gather(settings: Settings, job_id: str) -> Situation:
    engine = open_database(settings.database_url.get_secret_value())
    try:
        upgrade(engine)
        with closing(make_coordinator_app(settings)) as app:
            return gather(settings, engine, app, job_id, check_store=lambda: _store_trouble(settings))
    finally:
        engine.dispose()


def _store_trouble(settings: Settings) -> str:
    """Return why the object store cannot be used; empty if it can."""
    return within(_STORE_SECONDS, lambda: open_blob_store(settings).check(), what="The object store")


def _print(explanation: Explanation) -> None:
    click.echo(explanation.summary)
    if explanation.since is not None:
        click.echo(f"Since  {clock(explanation.since)} ({ago(explanation.since)})")
    if explanation.until is not None:
        click.echo(f"Until  {clock(explanation.until)} ({_ahead(explanation.until)})")
    if explanation.details:
        click.echo()
    for detail in explanation.details:
        click.echo(f"- {detail}")
    if explanation.actions:
        click.echo("\nWhat you can do:")
    for action in explanation.actions:
        click.echo(f"- {action}")


def _ahead(moment: datetime) -> str:
    """Return in how long that is, or how long ago it was."""
    seconds = (moment - datetime.now(UTC)).total_seconds()
    if seconds <= 0:
        return ago(moment)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"in {seconds / size:.0f} {unit}"
    return f"in {seconds:.0f} s"
