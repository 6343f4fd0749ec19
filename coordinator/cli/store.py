"""The group `store`: the model store's service, its model stores, who may use them, and what they feed."""

from pathlib import Path

import click

from common.errors import Conflict
from coordinator.cli.groups import ListingGroup
from coordinator.cli.model_search import find_model
from coordinator.cli.output import console, json_option, print_json, table
from coordinator.cli.reach import open_local, reach, url_option
from coordinator.cli.store_parties import parties
from coordinator.cli.store_serve import serve
from coordinator.cli.store_tenants import find_tenant, tenants
from coordinator.cli.store_upstreams import upstreams
from store.database import writing
from store.model_stores import grant, revoke

_upstream_option = click.option(
    "--upstream", metavar="ALIAS", help="Which upstream, if the model store has several: its alias or id."
)


@click.group(
    cls=ListingGroup,
    epilog="""\b
Example:
  fedchord store serve
  fedchord store create ddc:digits""",
)
def store() -> None:
    """Serve models, and manage model stores, tenants and upstreams.

    Without a command: list the model stores.
    """


@store.command(
    name="list",
    epilog="""\b
Example:
  fedchord store list --url http://127.0.0.1:8790""",
)
@url_option
@json_option
@click.pass_obj
def list_(config: Path | None, url: str | None, as_json: bool) -> None:
    """List the model stores that you may use."""
    with reach(config, url) as api:
        found = api.get_stores()
    if as_json:
        print_json(found)
        return
    rows = [(each["model_store_ddc"], each["tenant_id"][:8] or "-", each["description"], each["created_at"])
            for each in found]  # fmt: skip
    empty = "There are no model stores; `fedchord store create DDC` makes one, and so does every job."
    console().print(table(["STORE", "TENANT", "DESCRIPTION", "CREATED"], rows, empty=empty))


@store.command(
    epilog="""\b
Example:
  fedchord store create ddc:my_first_model_store"""
)
@click.argument("ddc")
@click.option("--description", default="", help="A sentence for people.")
@url_option
@json_option
@click.pass_obj
def create(config: Path | None, ddc: str, description: str, url: str | None, as_json: bool) -> None:
    """Create a model store.

    DDC is its name: `ddc:`, a letter or digit, then up to 99 letters, digits, dots, underscores, spaces, hyphens. To
    create one that is yours already changes nothing.
    """
    with reach(config, url) as api:
        created = api.initialize_model_store(ddc, description)
    if as_json:
        print_json(created)
    else:
        click.echo(f"{ddc} is there.")


@store.command(
    epilog="""\b
Example:
  fedchord store delete ddc:my_first_model_store --force"""
)
@click.argument("ddc")
@click.option("--force", is_flag=True, help="Also if there are models in it; they are deleted with it.")
@url_option
@json_option
@click.pass_obj
def delete(config: Path | None, ddc: str, force: bool, url: str | None, as_json: bool) -> None:
    """Delete a model store, with its models and upstreams.

    A store that a running job puts its models into stays.
    """
    with reach(config, url) as api:
        if not force and api.get_models(ddc, limit=1):
            raise Conflict(f"There are models in {ddc}; --force deletes them with it.")
        deleted = api.delete_store(ddc)
    if as_json:
        print_json({"model_store_ddc": ddc, "deleted": deleted})
    else:
        click.echo(f"Deleted {ddc}.")


@store.command(
    name="open",
    epilog="""\b
Example:
  fedchord store open ddc:digits clinic-a
  fedchord store open ddc:digits clinic-b --write""",
)
@click.argument("ddc")
@click.argument("tenant")
@click.option("--write", "may_write", is_flag=True, help="It may also put and delete models.")
@json_option
@click.pass_obj
def open_(config: Path | None, ddc: str, tenant: str, may_write: bool, as_json: bool) -> None:
    """Let a tenant read a model store, or also write.

    TENANT is its name or id. Said again, the last word counts. Works on the records of this machine.
    """
    with open_local(config) as opened, writing(opened.engine) as connection:
        found = find_tenant(connection, tenant)
        grant(connection, ddc, found.tenant_id, may_write=may_write)
    if as_json:
        print_json({"model_store_ddc": ddc, "tenant_id": found.tenant_id, "may_write": may_write})
    else:
        click.echo(f"{found.name} may {'read and write' if may_write else 'read'} {ddc}.")


@store.command(
    epilog="""\b
Example:
  fedchord store close ddc:digits clinic-a"""
)
@click.argument("ddc")
@click.argument("tenant")
@json_option
@click.pass_obj
def close(config: Path | None, ddc: str, tenant: str, as_json: bool) -> None:
    """Take back what `store open` has allowed.

    TENANT is its name or id. Works on the records of this machine.
    """
    with open_local(config) as opened, writing(opened.engine) as connection:
        found = find_tenant(connection, tenant)
        closed = revoke(connection, ddc, found.tenant_id)
    if as_json:
        print_json({"model_store_ddc": ddc, "tenant_id": found.tenant_id, "closed": closed})
    else:
        click.echo(f"{ddc} is closed to {found.name}{'' if closed else ', and was before'}.")


@store.command(
    epilog="""\b
Example:
  fedchord store feedback ddc:digits 0c2b"""
)
@click.argument("ddc")
@click.argument("model_id")
@_upstream_option
@url_option
@json_option
@click.pass_obj
def feedback(
    config: Path | None, ddc: str, model_id: str, upstream: str | None, url: str | None, as_json: bool
) -> None:
    """Send a model to the upstream of its model store.

    The model's id may be shortened. To send it again is safe: what is there is not sent twice.
    """
    with reach(config, url) as api:
        model = find_model(api, model_id, ddc)
        received = api.feedback(ddc, model["model_id"], upstream)
    if as_json:
        print_json(received)
    else:
        hops = received["hop_count"]
        click.echo(
            f"The upstream has {model['model_id'][:8]} as model {received['model_id']} of "
            f"{received['model_store_ddc']}, {hops} hop{'' if hops == 1 else 's'} from its maker."
        )


@store.command(
    epilog="""\b
Example:
  fedchord store transfer ddc:digits
  fedchord store transfer ddc:digits --info"""
)
@click.argument("ddc")
@click.option("--info", is_flag=True, help="Only show which model it would be; nothing is moved.")
@_upstream_option
@url_option
@json_option
@click.pass_obj
def transfer(config: Path | None, ddc: str, info: bool, upstream: str | None, url: str | None, as_json: bool) -> None:
    """Fetch the newest aggregated model from the upstream.

    Of what is here already, nothing is moved.
    """
    with reach(config, url) as api:
        model = api.proxy_request_transfer_info(ddc, upstream) if info else api.request_transfer(ddc, upstream)
    if as_json:
        print_json(model)
    elif info:
        click.echo(f"The upstream's newest aggregated model is {model['model_id']} of round {model['round']}.")
    else:
        click.echo(f"{ddc} has it as model {model['model_id']}, of round {model['round']}.")


for _command in (serve, tenants, upstreams, parties):
    store.add_command(_command)
