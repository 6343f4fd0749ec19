"""The commands `up`, `down` and `status`: the embedded stack."""

from pathlib import Path

import click

from common.errors import InvalidInput, Unavailable
from common.settings import Settings
from coordinator.cli.output import console, json_option, print_json, table
from coordinator.stack import lifecycle
from coordinator.stack.folder import DEFAULT_FOLDER, StackFolder
from coordinator.stack.lifecycle import StackStatus
from coordinator.stack.wishes import Wishes

folder_option = click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_FOLDER,
    show_default=True,
    help="The folder that holds the stack.",
)
_ACCESS = {"open": "open to everybody on this machine", "keys": "with an API key and secret"}
_PORT = click.IntRange(1, 65535)


@click.command(
    epilog="""\b
Example:
  fedchord up --sites 3 --trainer digits-mlp=examples.digits.trainer:DigitsTrainer --flower"""
)
@folder_option
@click.option("--sites", "num_sites", type=click.IntRange(0, 1000), help="How many sites.  [default: 2]")
@click.option(
    "--coordinators",
    "num_coordinators",
    type=click.IntRange(1, 100),
    help="How many coordinator workers; they share the work, and the others go on when one ends.  [default: 2]",
)
@click.option(
    "--trainer",
    "trainers",
    multiple=True,
    metavar="NAME=MODULE:CLASS",
    help="A trainer that the sites offer; can be repeated. It is imported from the folder that `up` runs in.",
)
@click.option(
    "--site-data",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The sites' data: a folder with one folder for each site, named like the site.",
)
@click.option("--port", type=_PORT, help="The broker's port.  [default: any free one]")
@click.option("--http-port", type=_PORT, help="The HTTP service's port.  [default: any free one at the first `up`]")
@click.option("--flower/--no-flower", default=None, help="Start Flower, the dashboard of the queues.  [default: no]")
@click.option("--flower-port", type=_PORT, help="Flower's port.  [default: any free one]")
@json_option
def up(
    folder: Path,
    num_sites: int | None,
    num_coordinators: int | None,
    trainers: tuple[str, ...],
    site_data: Path | None,
    port: int | None,
    http_port: int | None,
    flower: bool | None,
    flower_port: int | None,
    as_json: bool,
) -> None:
    """Start an embedded stack: broker, coordinator workers, sites.

    All of it runs on this machine as processes of your own, reachable from this machine only, until `fedchord down`.
    The coordinator's models and jobs can also be had over HTTP, at the URL that `up` and `status` show. What is not
    said here stays as it was at the last `up` of the same folder; jobs that were running go on.
    """
    wishes = Wishes(
        num_sites=num_sites,
        num_coordinators=num_coordinators,
        trainers=dict(map(_parse_trainer, trainers)) if trainers else None,
        site_data=site_data,
        broker_port=port,
        http_port=http_port,
        flower=True if flower_port is not None and flower is None else flower,
        flower_port=flower_port,
    )
    found = lifecycle.up(folder, wishes)
    if as_json:
        print_json(_document(found))
        return
    click.echo(f"The stack in {found.folder} is up: {len(found.processes)} processes.")
    click.echo(f"Broker   {found.broker}")
    click.echo(f"HTTP     {found.http} (models and jobs, {_ACCESS[Settings.load(found.settings_file).http_access]})")
    if found.flower is not None:
        password = StackFolder(folder).load().flower_password
        click.echo(f"Flower   {found.flower} (user fedchord, password {password})")
    config = "" if folder == DEFAULT_FOLDER else f" --config {found.settings_file}"
    click.echo(f"Next     fedchord{config} submit JOB.toml --watch")
    if not StackFolder(folder).load().trainers:
        click.echo("The sites offer no trainer yet: `fedchord down`, then `fedchord up --trainer NAME=MODULE:CLASS`.")


@click.command(
    epilog="""\b
Example:
  fedchord down --folder fedchord-stack"""
)
@folder_option
@json_option
def down(folder: Path, as_json: bool) -> None:
    """Stop the embedded stack; its data stays.

    Stops the sites, the coordinator and the broker, in this order, and whatever a crash has left of them.
    """
    stopped = lifecycle.down(folder)
    if as_json:
        print_json({"folder": folder.absolute(), "stopped": stopped})
    elif stopped:
        click.echo(f"Stopped {stopped} processes. The data is still in {folder}; `fedchord up` goes on with it.")
    else:
        click.echo(f"Nothing was running. The data is in {folder}.")


@click.command(
    epilog="""\b
Example:
  fedchord status --json"""
)
@folder_option
@json_option
def status(folder: Path, as_json: bool) -> None:
    """Show how the embedded stack is.

    The exit code is 0 if all of it runs, else 5.
    """
    found = lifecycle.status(folder)
    if as_json:
        print_json(_document(found))
    else:
        rows = [(each.name, each.state.lower(), each.pid or None, _uptime(each.seconds)) for each in found.processes]
        if found.is_running and found.http is not None:
            click.echo(f"HTTP service: {found.http}")
        console().print(table(["PROCESS", "STATE", "PID", "UP FOR"], rows, empty=_stopped(found)))
        if found.is_running and found.sites_missing:
            click.echo(f"No heartbeat from {', '.join(found.sites_missing)}; see the logs in {found.folder / 'logs'}.")
    if not found.is_well:
        raise click.exceptions.Exit(Unavailable.exit_code)


def _parse_trainer(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    module, colon, class_name = path.partition(":")
    if not (name and equals and module and colon and class_name.isidentifier()):
        raise InvalidInput(f"--trainer: {text!r} is not NAME=MODULE:CLASS, as in digits=mycode.trainer:Digits.")
    return name, path


def _document(found: StackStatus) -> dict[str, object]:
    return {
        "folder": found.folder,
        "running": found.is_running,
        "well": found.is_well,
        "broker": found.broker,
        "settings_file": found.settings_file,
        "http": found.http,
        "flower": found.flower,
        "processes": found.processes,
        "sites_missing": found.sites_missing,
        "leftovers": found.leftovers,
    }


def _stopped(found: StackStatus) -> str:
    if found.leftovers:
        return (
            f"The stack in {found.folder} has crashed and left {found.leftovers} processes; "
            "`fedchord down` ends them, `fedchord up` starts it again."
        )
    return f"The stack in {found.folder} is not running; `fedchord up` starts it."


def _uptime(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
