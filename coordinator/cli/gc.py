"""The command `gc`."""

from pathlib import Path

import click

from coordinator.cli.output import json_option, print_json, size_text
from coordinator.cli.reach import open_local
from store.garbage import find_unused, remove_unused


@click.command(
    epilog="""\b
Example:
  fedchord gc --dry-run"""
)
@click.option("--dry-run", is_flag=True, help="Remove nothing, only tell what would be.")
@click.option(
    "--older-than-hours",
    type=click.FloatRange(0),
    help="Only what was stored so long ago. Bytes of a put that is under way are not a model's yet: with less than the "
    "longest put takes, it fails.  [default: the setting keep_unused_hours]",
)
@json_option
@click.pass_obj
def gc(config: Path | None, dry_run: bool, older_than_hours: float | None, as_json: bool) -> None:
    """Remove the bytes that no model needs any more.

    Those of deleted models and of puts that were never finished. The coordinator and the model store's service do it
    every hour by themselves.
    """
    with open_local(config) as store:
        hours = store.settings.keep_unused_hours if older_than_hours is None else older_than_hours
        look = find_unused if dry_run else remove_unused
        found = look(store.engine, store.blobs, older_than_seconds=hours * 3600)
    size = sum(blob.size for blob in found)
    if as_json:
        print_json({"dry_run": dry_run, "blobs": found, "bytes": size})
    else:
        click.echo(f"{'Would remove' if dry_run else 'Removed'} {len(found)} blobs, {size_text(size)}.")
