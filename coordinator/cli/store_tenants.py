"""The group `store tenants`: who may call the service, each with an API key and a secret."""

from pathlib import Path

import click
from sqlalchemy import Connection

from coordinator.cli.groups import ListingGroup
from coordinator.cli.output import console, document, json_option, print_json, table
from coordinator.cli.reach import open_local
from coordinator.cli.short_ids import pick_id
from store.database import reading, writing
from store.tenants import Tenant, add_tenant, renew_secret, set_tenant_enabled
from store.tenants import tenants as all_tenants


@click.group(
    cls=ListingGroup,
    epilog="""\b
Example:
  fedchord store tenants
  fedchord store tenants add clinic-a""",
)
def tenants() -> None:
    """List, add, enable and disable tenants, and renew secrets.

    Without a command: list them. A tenant calls the service with its API key and secret, which are asked for where the
    setting http_access is "keys". It may use its own model stores and those that `store open` opens to it. All of it
    works on the records of this machine.
    """


@tenants.command(
    name="list",
    epilog="""\b
Example:
  fedchord store tenants list --json""",
)
@json_option
@click.pass_obj
def list_(config: Path | None, as_json: bool) -> None:
    """List the tenants; their secrets are not kept."""
    with open_local(config) as opened, reading(opened.engine) as connection:
        found = all_tenants(connection)
    if as_json:
        print_json(found)
        return
    rows = [
        (each.name, each.tenant_id[:8], each.api_key, "operator" if each.is_operator else "tenant",
         "yes" if each.enabled else "no", each.created_at)
        for each in found
    ]  # fmt: skip
    empty = "There are no tenants; `fedchord store tenants add NAME` adds one."
    console().print(table(["TENANT", "ID", "API KEY", "MAY DO", "ENABLED", "ADDED"], rows, empty=empty))


@tenants.command(
    epilog="""\b
Example:
  fedchord store tenants add clinic-a
  fedchord store tenants add operations --operator"""
)
@click.argument("name")
@click.option("--operator", "is_operator", is_flag=True, help="It may do everything, with every model store.")
@json_option
@click.pass_obj
def add(config: Path | None, name: str, is_operator: bool, as_json: bool) -> None:
    """Add a tenant, and print its API key and secret.

    The secret is shown this once; only a hash of it is kept.
    """
    with open_local(config) as opened, writing(opened.engine) as connection:
        tenant, secret = add_tenant(connection, name, is_operator=is_operator)
    if as_json:
        print_json({**document(tenant), "secret": secret})
        return
    click.echo(f"API key  {tenant.api_key}\nSecret   {secret}")
    click.echo(f"{name} sends them as the headers APIKey and Secret. The secret is not shown again.")


@tenants.command(
    epilog="""\b
Example:
  fedchord store tenants disable clinic-a"""
)
@click.argument("tenant")
@json_option
@click.pass_obj
def disable(config: Path | None, tenant: str, as_json: bool) -> None:
    """Refuse a tenant's calls from now on; what it has stays."""
    _set_enabled(config, tenant, False, as_json=as_json)


@tenants.command(
    epilog="""\b
Example:
  fedchord store tenants enable clinic-a"""
)
@click.argument("tenant")
@json_option
@click.pass_obj
def enable(config: Path | None, tenant: str, as_json: bool) -> None:
    """Take a tenant's calls again, with the same key and secret."""
    _set_enabled(config, tenant, True, as_json=as_json)


@tenants.command(
    epilog="""\b
Example:
  fedchord store tenants renew clinic-a"""
)
@click.argument("tenant")
@json_option
@click.pass_obj
def renew(config: Path | None, tenant: str, as_json: bool) -> None:
    """Give a tenant a new secret, and print it; the old one ends at once."""
    with open_local(config) as opened, writing(opened.engine) as connection:
        found = find_tenant(connection, tenant)
        secret = renew_secret(connection, found.tenant_id)
    if as_json:
        print_json({**document(found), "secret": secret})
    else:
        click.echo(f"API key  {found.api_key}\nSecret   {secret}")


def find_tenant(connection: Connection, text: str) -> Tenant:
    """Return the tenant of that name, or whose id begins so; raise NotFound if there is none or more than one."""
    ids = {tenant.tenant_id: tenant for tenant in all_tenants(connection)}
    for tenant in ids.values():
        if tenant.name == text:
            return tenant
    return ids[pick_id(ids, text, what="tenant", command="store tenants")]


def _set_enabled(config: Path | None, text: str, enabled: bool, *, as_json: bool) -> None:
    with open_local(config) as opened, writing(opened.engine) as connection:
        tenant = set_tenant_enabled(connection, find_tenant(connection, text).tenant_id, enabled)
    if as_json:
        print_json(tenant)
    else:
        click.echo(f"{tenant.name} is {'enabled' if enabled else 'disabled'}.")
