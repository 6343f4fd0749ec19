"""The group `sites`: who takes part."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from common.errors import BrokerUnavailable, Conflict, InvalidInput
from common.heartbeats import Heartbeat, read_heartbeats
from common.queues import check_site_name
from common.signing import SigningKey, check_public_key
from coordinator.cli.output import (
    console,
    document,
    json_option,
    open_coordinator,
    print_json,
    table,
)
from coordinator.services import Services
from coordinator.stack.kit import KEY_FILE, SETTINGS_FILE, draft_kit, drafted_key, finish_kit, site_values
from store.database import reading, writing
from store.parties import PartyInfo, enroll_site, remove_site, set_enabled
from store.parties import sites as enrolled_sites

logger = logging.getLogger(__name__)

_GIGABYTE = 10**9
_BROKER_SCHEMES = ("redis://", "rediss://")
_COLUMNS = (
    "SITE",
    "ENABLED",
    "ALIVE",
    "WORKING ON",
    "FREE SLOTS",
    "CPU",
    "FREE MEMORY",
    "GPUS",
    "TRAINERS",
    "VERSION",
)


@click.group(
    invoke_without_command=True,
    epilog="""\b
Example:
  fedchord sites
  fedchord sites add clinic-a --folder clinic-a""",
)
@json_option
@click.pass_context
def sites(ctx: click.Context, as_json: bool) -> None:
    """List, enroll, enable, disable and remove sites.

    Without a command: list them, with what each one's heartbeat tells; while the broker is away, that is unknown.
    """
    if ctx.invoked_subcommand is not None:
        return
    with open_coordinator(ctx.obj, needs_broker=False) as services:
        with reading(services.engine) as connection:
            parties = enrolled_sites(connection)
        heartbeats = _heartbeats(services, parties)
    if as_json:
        print_json([_document(party, heartbeats) for party in parties])
        return
    rows = [_row(party, heartbeats) for party in parties]
    console().print(table(_COLUMNS, rows, empty="No site is enrolled; `fedchord sites add NAME` enrolls one."))


@sites.command(
    epilog="""\b
Example:
  fedchord sites add clinic-a --broker-url rediss://clinic-a:PASSWORD@broker.example.org:6379/0
  fedchord sites add clinic-b --public-key 3q2+7wAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="""
)
@click.argument("name")
@click.option(
    "--public-key",
    metavar="KEY",
    help="The site's own public key, if its admin made the pair with `fedchord keys new`; then no private key leaves "
    "the site.",
)
@click.option(
    "--broker-url",
    metavar="URL",
    help="The broker with the site's own user and password.  [default: the coordinator's, who may read and write "
    "everything in the broker]",
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where to write what the site's admin needs.  [default: NAME]",
)
@json_option
@click.pass_obj
def add(
    config: Path | None,
    name: str,
    public_key: str | None,
    broker_url: str | None,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Enroll a site, and write the folder that its admin needs.

    The folder holds site.toml and, unless the site has a key already, signing.key. Hand it over on a safe way: the
    broker's password and the key are in it. If it was interrupted, the same command goes on with it. With the public
    key that an enrolled site has, its folder is written anew.
    """
    check_site_name(name)
    folder = folder or Path(name)
    key = None if public_key is not None else drafted_key(folder, name) or SigningKey.generate()
    own_public_key = key.public_key if key is not None else check_public_key(public_key or "")
    _check_broker_url(broker_url)
    with open_coordinator(config, needs_broker=False) as services:
        _check_new(services, name, own_public_key)
        values = site_values(
            services.settings,
            site=name,
            coordinator_public_key=services.key.public_key,
            data=Path("data"),
            trainers={},
            broker_url=broker_url,
        )
        draft_kit(folder, name, values, key)
        with writing(services.engine) as connection:
            enroll_site(connection, name, own_public_key)
        finish_kit(folder, name)
    command = f"FEDCHORD_CONFIG={folder / SETTINGS_FILE} celery -A worker worker"
    if as_json:
        print_json(
            {"site": name, "folder": folder, "coordinator_public_key": services.key.public_key, "start": command}
        )
        return
    click.echo(f"Enrolled {name}. Its folder is {folder}: give it to the site's admin, who sets in {SETTINGS_FILE}")
    click.echo("  site_data        where the site's data is")
    click.echo('  [site_trainers]  what may run there: NAME = "module:Class"')
    if key is None:
        click.echo(f"puts the site's own private key in {KEY_FILE} beside it,")
    click.echo(f"and starts the site with\n  {command}")


@sites.command(
    epilog="""\b
Example:
  fedchord sites enable clinic-a"""
)
@click.argument("name")
@json_option
@click.pass_obj
def enable(config: Path | None, name: str, as_json: bool) -> None:
    """Let a site take part again, from the next round on."""
    _set_enabled(config, name, True, "", as_json=as_json)


@sites.command(
    epilog="""\b
Example:
  fedchord sites disable clinic-a --reason "moves its servers" """
)
@click.argument("name")
@click.option("--reason", default="by the operator", show_default=True, help="Why; shown to whoever wants to use it.")
@json_option
@click.pass_obj
def disable(config: Path | None, name: str, reason: str, as_json: bool) -> None:
    """Keep a site out of every job, from the next round on."""
    _set_enabled(config, name, False, reason, as_json=as_json)


@sites.command(
    epilog="""\b
Example:
  fedchord sites remove clinic-a"""
)
@click.argument("name")
@json_option
@click.pass_obj
def remove(config: Path | None, name: str, as_json: bool) -> None:
    """Forget a site; its key is no longer accepted.

    Models that it has a share in stay.
    """
    with open_coordinator(config, needs_broker=False) as services, writing(services.engine) as connection:
        remove_site(connection, name)
    if as_json:
        print_json({"site": name, "removed": True})
    else:
        click.echo(f"Removed {name}.")


def _set_enabled(config: Path | None, name: str, enabled: bool, reason: str, *, as_json: bool) -> None:
    with open_coordinator(config, needs_broker=False) as services:
        with writing(services.engine) as connection:
            party = set_enabled(connection, name, enabled, reason)
        heartbeats = _heartbeats(services, [party])
    if as_json:
        print_json(_document(party, heartbeats))
    else:
        click.echo(f"{name} is {'enabled' if enabled else 'disabled'}.")


def _check_new(services: Services, name: str, public_key: str) -> None:
    """Raise Conflict if the site is enrolled with another key, before a kit is written."""
    with reading(services.engine) as connection:
        known = {party.site: party.public_key for party in enrolled_sites(connection)}
    if known.get(name, public_key) != public_key:
        raise Conflict(
            f"Site {name} is enrolled already; `fedchord sites remove {name}` comes first if it is to get a new key."
        )


def _check_broker_url(url: str | None) -> None:
    if url is not None and not url.startswith(_BROKER_SCHEMES):
        raise InvalidInput(f"--broker-url: it begins with none of {', '.join(_BROKER_SCHEMES)}; write a URL of Redis.")


def _heartbeats(services: Services, parties: Sequence[PartyInfo]) -> Mapping[str, Heartbeat] | None:
    """Return the heartbeats of the sites that are alive; None, which is not known, while the broker is away."""
    try:
        return read_heartbeats(services.broker, [party.site for party in parties if party.site])
    except BrokerUnavailable as error:
        logger.warning("Who is alive is not known: %s", error.message, extra={"action": "list_sites"})
        return None


def _document(party: PartyInfo, heartbeats: Mapping[str, Heartbeat] | None) -> dict[str, object]:
    if heartbeats is None:
        return {**document(party), "alive": None, "heartbeat": None}
    heartbeat = heartbeats.get(party.site or "")
    return {**document(party), "alive": heartbeat is not None, "heartbeat": document(heartbeat)}


def _row(party: PartyInfo, heartbeats: Mapping[str, Heartbeat] | None) -> tuple[object, ...]:
    enabled = "yes" if party.enabled else f"no: {party.reason}"
    heartbeat = (heartbeats or {}).get(party.site or "")
    if heartbeat is None:
        alive = "unknown" if heartbeats is None else "no"
        return (party.site, enabled, alive, *[""] * (len(_COLUMNS) - 3))
    return (
        party.site,
        enabled,
        "yes",
        "; ".join(heartbeat.working_on) or "-",
        f"{heartbeat.free_slots} of {heartbeat.slots}",
        f"{heartbeat.cpu_percent:.0f} %",
        f"{heartbeat.memory_available / _GIGABYTE:.1f} of {heartbeat.memory_total / _GIGABYTE:.1f} GB",
        ", ".join(gpu.name for gpu in heartbeat.gpus) or "-",
        ", ".join(heartbeat.trainers) or "-",
        heartbeat.version,
    )
