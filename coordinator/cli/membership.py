"""The commands `join` and `leave`."""

from pathlib import Path

import click

from coordinator import membership
from coordinator.cli.output import document, json_option, open_coordinator, print_json


@click.command(
    epilog="""\b
Example:
  fedchord join 3f9a clinic-d"""
)
@click.argument("job_id")
@click.argument("site")
@json_option
@click.pass_obj
def join(config: Path | None, job_id: str, site: str, as_json: bool) -> None:
    """Let a site take part in a job from its next round on.

    Also one that has left the job, or that is paused. JOB_ID may be shortened to what is unique.
    """
    with open_coordinator(config) as services:
        job = membership.join(services, job_id, site)
    if as_json:
        print_json(document(job))
    else:
        click.echo(f"Site {site} takes part in {job.name} ({job.job_id}) from its next round on.")


@click.command(
    epilog="""\b
Example:
  fedchord leave 3f9a clinic-d --reason "its data are being corrected" """
)
@click.argument("job_id")
@click.argument("site")
@click.option("--reason", default="by the operator", show_default=True, help="Why; the site is told.")
@json_option
@click.pass_obj
def leave(config: Path | None, job_id: str, site: str, reason: str, as_json: bool) -> None:
    """Take a site out of a job.

    The round that goes on does not wait for it any more; the job and the site's other jobs go on. JOB_ID may be
    shortened to what is unique.
    """
    with open_coordinator(config) as services:
        job = membership.leave(services, job_id, site, reason)
    if as_json:
        print_json(document(job))
    else:
        click.echo(f"Site {site} is out of {job.name} ({job.job_id}); {len(job.sites)} sites go on.")
