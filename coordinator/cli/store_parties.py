"""The group `store parties`: who has registered with the upstream."""

from pathlib import Path

import click

from coordinator.cli.groups import ListingGroup
from coordinator.cli.output import console, json_option, print_json, table
from coordinator.cli.reach import reach, url_option
from coordinator.cli.short_ids import pick_id


@click.group(
    cls=ListingGroup,
    epilog="""\b
Example:
  fedchord store parties
  fedchord store parties add "the digits of clinic A" """,
)
def parties() -> None:
    """List, register and remove parties at the upstream.

    Without a command: list them. A node without an upstream answers for itself.
    """


@parties.command(
    name="list",
    epilog="""\b
Example:
  fedchord store parties list --here""",
)
@click.option("--here", is_flag=True, help="Those that have registered at this node itself, not at its upstream.")
@url_option
@json_option
@click.pass_obj
def list_(config: Path | None, here: bool, url: str | None, as_json: bool) -> None:
    """List the parties that the upstream knows."""
    with reach(config, url) as api:
        found = api.get_parties(here=here)
    if as_json:
        print_json(found)
        return
    rows = [
        (each["id"][:8], each["tenant_name"] or "-", each["hop_count"], each["description"], each["updated_at"])
        for each in found
    ]
    empty = "No party has registered; `fedchord store parties add` registers this one."
    console().print(table(["PARTY", "NAME", "HOPS", "DESCRIPTION", "UPDATED"], rows, empty=empty))


@parties.command(
    epilog="""\b
Example:
  fedchord store parties add "my experiment 1" """
)
@click.argument("description", default="")
@url_option
@json_option
@click.pass_obj
def add(config: Path | None, description: str, url: str | None, as_json: bool) -> None:
    """Register this node as a party at the upstream.

    Who it is, the settings tenant_id and tenant_name say. The upstream tells its own upstream, and so on.
    """
    with reach(config, url) as api:
        party = api.create_party(description)
    if as_json:
        print_json(party)
    else:
        click.echo(f"Registered as party {party['id']}.")


@parties.command(
    epilog="""\b
Example:
  fedchord store parties remove 6f1c"""
)
@click.argument("party_id")
@url_option
@json_option
@click.pass_obj
def remove(config: Path | None, party_id: str, url: str | None, as_json: bool) -> None:
    """Remove a party from the upstream, and from those above it.

    The id may be shortened to what is unique.
    """
    with reach(config, url) as api:
        ids = [each["id"] for each in api.get_parties()]
        found = pick_id(ids, party_id, what="party", command="store parties")
        removed = api.delete_party(found)
    if as_json:
        print_json({"id": found, "removed": removed})
    else:
        click.echo(f"Removed party {found}.")
