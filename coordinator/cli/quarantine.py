"""The group `quarantine`: updates that the gate refused, and what a person decides about them."""

import getpass
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from coordinator.cli.groups import ListingGroup
from coordinator.cli.output import (
    console,
    document,
    json_option,
    metrics_text,
    open_coordinator,
    print_json,
    table,
    text,
)
from coordinator.jobs import find_job
from coordinator.quarantine import Entry, EntryState, find_entries, find_entry
from coordinator.services import Services
from store.database import reading


@click.group(
    cls=ListingGroup,
    epilog="""\b
Example:
  fedchord quarantine
  fedchord quarantine release 3f9a0000-1c1b-4c5e-9d5e-0a51f9a5ab11.train.4.beta""",
)
def quarantine() -> None:
    """List, show, release and refuse quarantined updates.

    Without a command: list them. An update is quarantined when it is not what it must be, when it is further from the
    global model than the job allows, or much further than the other updates of its round. It does not count, and its
    bytes are kept for some days (the setting quarantine_days), so that a person can look at them and decide.
    """


@quarantine.command(
    name="list",
    epilog="""\b
Example:
  fedchord quarantine list --job 3f9a --json""",
)
@click.option("--job", help="Only those of this job: its id, or how that begins.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1), help="At most so many, the newest.")
@json_option
@click.pass_obj
def list_(config: Path | None, job: str | None, limit: int, as_json: bool) -> None:
    """List the quarantined updates, the newest first, those that are decided included."""
    with open_coordinator(config, needs_broker=False) as services, reading(services.engine) as connection:
        job_id = find_job(connection, job).job_id if job is not None else None
        entries = find_entries(connection, job_id=job_id, limit=limit)
        if as_json:
            print_json([_document(services, entry) for entry in entries])
            return
    rows = [(each.task_id, each.job_name, each.state, each.size, each.created_at, each.reason) for each in entries]
    empty = "Nothing is quarantined."
    console().print(table(["TASK", "JOB", "STATE", "BYTES", "SINCE", "REASON"], rows, empty=empty))


@quarantine.command(
    epilog="""\b
Example:
  fedchord quarantine show 3f9a0000-1c1b-4c5e-9d5e-0a51f9a5ab11.train.4.beta"""
)
@click.argument("task")
@json_option
@click.pass_obj
def show(config: Path | None, task: str, as_json: bool) -> None:
    """Show a quarantined update: what was announced, what came, why it was refused, who decided what."""
    with open_coordinator(config, needs_broker=False) as services:
        with reading(services.engine) as connection:
            entry = find_entry(connection, task)
        _show(services, entry, as_json=as_json)


@quarantine.command(
    epilog="""\b
Example:
  fedchord quarantine release 3f9a0000-1c1b-4c5e-9d5e-0a51f9a5ab11.train.4.beta"""
)
@click.argument("task")
@json_option
@click.pass_obj
def release(config: Path | None, task: str, as_json: bool) -> None:
    """Let a quarantined update count after all.

    That is possible while its round is open, and only for what can be aggregated: not for values that are not finite,
    other shapes, or other bytes than the site announced. When the round has ended, the update is kept as a model that
    is not aggregated, and the command ends with code 4.
    """
    from coordinator.releasing import release as release_entry

    with open_coordinator(config, needs_broker=False) as services:
        _show(services, release_entry(services, task, by=_user()), as_json=as_json)


@quarantine.command(
    epilog="""\b
Example:
  fedchord quarantine refuse 3f9a0000-1c1b-4c5e-9d5e-0a51f9a5ab11.train.4.beta"""
)
@click.argument("task")
@json_option
@click.pass_obj
def refuse(config: Path | None, task: str, as_json: bool) -> None:
    """Refuse a quarantined update for good: its bytes are removed, its record stays.

    While its round goes on, the bytes stay until the next clean-up.
    """
    from coordinator.releasing import refuse as refuse_entry

    with open_coordinator(config, needs_broker=False) as services:
        _show(services, refuse_entry(services, task, by=_user()), as_json=as_json)


def _document(services: Services, entry: Entry) -> dict[str, Any]:
    return {**document(entry), "size": entry.size, "expires_at": document(_expires_at(services, entry))}


def _expires_at(services: Services, entry: Entry) -> object:
    """Return until when the bytes are kept; None if somebody, or time, has decided."""
    if entry.state is not EntryState.HELD:
        return None
    return entry.created_at + timedelta(days=services.settings.quarantine_days)


def _show(services: Services, entry: Entry, *, as_json: bool) -> None:
    if as_json:
        print_json(_document(services, entry))
        return
    expires_at = document(_expires_at(services, entry))
    decided = f" by {entry.decided_by} at {document(entry.decided_at)}" if entry.decided_by else ""
    norms = f"{text(entry.update_norm)} from a global model of norm {text(entry.global_norm)}"
    lines = [
        ("Task", entry.task_id),
        ("Job", f"{entry.job_name} ({entry.job_id})"),
        ("Site", entry.site),
        ("State", f"{entry.state}{decided}"),
        ("Reason", entry.reason),
        ("Since", document(entry.created_at)),
        ("Kept until", expires_at or "-"),
        ("Examples", text(entry.num_examples)),
        ("Metrics", metrics_text(entry.metrics) or "-"),
        ("Distance", norms if entry.update_norm is not None else "-"),
        ("Model", entry.model_id or "-"),
    ]
    for number, announced in enumerate(entry.announced):
        found = entry.found[number] if number < len(entry.found) else None
        lines.append((f"Shard {number + 1}", f"announced {announced.digest}, {announced.size} bytes"))
        if found is None:
            lines.append(("", "not kept: nothing came, or more than the gate takes"))
        elif found != announced:
            lines.append(("", f"came      {found.digest}, {found.size} bytes"))
    width = max(len(name) for name, _ in lines) + 2
    for name, value in lines:
        click.echo(f"{name.ljust(width)}{value}")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no name for this user id, as in a container
        return f"user {Path.home()}"
