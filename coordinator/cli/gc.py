"""The command `gc`."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import click

from coordinator.cli.output import json_option, print_json, size_text
from coordinator.cli.reach import open_local
from coordinator.stack.old_logs import OldLog, clean_logs, find_old_logs
from store.blobs import Blob
from store.garbage import UNNAMED, find_unused, kinds_of, remove_unused
from store.opening import OpenStore
from store.retention import Due, expire, find_due


@click.command(
    epilog="""\b
Example:
  fedchord gc --dry-run"""
)
@click.option("--dry-run", is_flag=True, help="Change nothing, only tell what would be.")
@click.option(
    "--older-than-hours",
    type=click.FloatRange(0),
    help="Only what was stored, or has expired, so long ago. Bytes of a put that is under way are not a model's yet: "
    "with less than the longest put takes, it fails; and so may a download of what has expired.  "
    "[default: the setting keep_unused_hours]",
)
@json_option
@click.pass_obj
def gc(config: Path | None, dry_run: bool, older_than_hours: float | None, as_json: bool) -> None:
    """Remove the bytes that are not needed or not kept any more.

    The bytes of old updates and old global models expire, by age and size, as the settings keep_updates_… and
    keep_models_… say; their records stay. Then the bytes go of deleted models, of puts that were never finished and of
    what expired some time ago, and an embedded stack's old logs. The coordinator does it every hour by itself.
    """
    with open_local(config) as store:
        hours = store.settings.keep_unused_hours if older_than_hours is None else older_than_hours
        expired, removed = (_look if dry_run else _clean)(store, hours * 3600)
        kinds = kinds_of(store.engine, removed, expiring=[each.model_id for each in expired])
        logs = (find_old_logs if dry_run else clean_logs)(store.settings)
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                "expired": expired,
                "blobs": [
                    {"digest": blob.digest, "size": blob.size, "model_kind": None if kind == UNNAMED else kind}
                    for kind, blobs in kinds.items()
                    for blob in blobs
                ],
                "bytes": sum(blob.size for blob in removed),
                "logs": logs,
            }
        )
        return
    _print(expired, kinds, logs, dry_run=dry_run)


def _look(store: OpenStore, older_than_seconds: float) -> tuple[list[Due], list[Blob]]:
    due = find_due(store.engine, store.settings)
    ids = [each.model_id for each in due]
    return due, find_unused(store.engine, store.blobs, older_than_seconds=older_than_seconds, expiring=ids)


def _clean(store: OpenStore, older_than_seconds: float) -> tuple[list[Due], list[Blob]]:
    expired = expire(store.engine, store.settings)
    return expired, remove_unused(store.engine, store.blobs, older_than_seconds=older_than_seconds)


def _print(
    expired: Sequence[Due], kinds: Mapping[str, Sequence[Blob]], logs: Sequence[OldLog], *, dry_run: bool
) -> None:
    did_expire, did_remove = ("Would let expire", "Would remove") if dry_run else ("Let expire", "Removed")
    for (kind, reason), group in groupby(sorted(expired, key=_kind_and_reason), key=_kind_and_reason):
        sizes = [each.bytes for each in group]
        click.echo(f"{did_expire} {len(sizes)} of kind {kind}, {size_text(sum(sizes))}: {reason}")
    sizes = [blob.size for blobs in kinds.values() for blob in blobs]
    click.echo(f"{did_remove} {len(sizes)} blobs, {size_text(sum(sizes))}.")
    for kind, blobs in sorted(kinds.items()):
        whose = "that no model names" if kind == UNNAMED else f"of expired models of kind {kind}"
        click.echo(f"    {len(blobs)} {whose}, {size_text(sum(blob.size for blob in blobs))}")
    if logs:
        click.echo(f"{did_remove} {len(logs)} old logs, {size_text(sum(log.bytes for log in logs))}.")


def _kind_and_reason(due: Due) -> tuple[str, str]:
    return due.model_kind, due.reason
