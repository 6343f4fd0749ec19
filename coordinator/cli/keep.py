"""The command `models keep`."""

import getpass
from pathlib import Path

import click

from coordinator.cli.output import json_option, print_json, size_text
from coordinator.cli.reach import open_local
from store.database import reading
from store.keeping import Keeping, keep_model, stop_keeping
from store.models import find_model


@click.command(
    epilog="""\b
Example:
  fedchord models keep 0c2b
  fedchord models keep 0c2b --off"""
)
@click.argument("model_id")
@click.option("--off", is_flag=True, help="Keep it no more than any other model.")
@json_option
@click.pass_obj
def keep(config: Path | None, model_id: str, off: bool, as_json: bool) -> None:
    """Keep a model and all that it comes from.

    Their bytes then do not expire, whatever their age and size, and `fedchord verify` can always recompute the model.
    What has expired already comes back if its bytes are still there. It works on the records of this machine only.
    """
    with open_local(config) as store:
        with reading(store.engine) as connection:
            model = find_model(connection, model_id)
        if off:
            done = stop_keeping(store.engine, model.model_id, by=_user())
        else:
            done = keep_model(store.engine, store.blobs, model.model_id, by=_user())
    if as_json:
        print_json(
            {
                "model_id": done.model.model_id,
                "kept": done.model.kept,
                "models": done.models,
                "bytes": done.bytes,
                "revived": done.revived,
                "gone": done.gone,
            }
        )
    else:
        _print(done)


def _print(done: Keeping) -> None:
    name = done.model.model_description or done.model.model_id
    if not done.model.kept:
        click.echo(f"{name} is kept no more than any other model.")
        return
    click.echo(f"Keeping {name}, with {done.models - 1} models that it comes from, {size_text(done.bytes)} in all.")
    if done.revived:
        click.echo(f"{len(done.revived)} of them had expired and are back.")
    if done.gone:
        click.echo(f"{len(done.gone)} of them had expired and are gone: the model cannot be recomputed from the first.")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no name for this user id, as in a container
        return f"user {Path.home()}"
