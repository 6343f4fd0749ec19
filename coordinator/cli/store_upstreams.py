"""The group `store upstreams`: the services that model stores feed."""

import sys
from pathlib import Path

import click

from common.errors import InvalidInput
from coordinator.cli.groups import ListingGroup
from coordinator.cli.output import console, json_option, print_json, table
from coordinator.cli.reach import StoreApi, client_settings, reach, url_option
from coordinator.cli.short_ids import pick_id
from store.upstreams import DEFAULT_ALIAS


@click.group(
    cls=ListingGroup,
    epilog="""\b
Example:
  fedchord store upstreams
  fedchord store upstreams add ddc:digits --to https://models.example.org""",
)
def upstreams() -> None:
    """List, add, enable, disable and remove upstreams.

    Without a command: list them. An operator's model store without an upstream of its own feeds the one of the setting
    upstream_url.
    """


@upstreams.command(
    name="list",
    epilog="""\b
Example:
  fedchord store upstreams list --store ddc:digits""",
)
@click.option("--store", "ddc", metavar="DDC", help="Only those of this model store.")
@url_option
@json_option
@click.pass_obj
def list_(config: Path | None, ddc: str | None, url: str | None, as_json: bool) -> None:
    """List the upstreams; their secrets are not shown."""
    with reach(config, url) as api:
        found = api.list_upstream_info(ddc)
    if as_json:
        print_json(found)
        return
    rows = [
        (each["id"][:8], each["model_store_ddc"], each["upstream_endpoint"], each["upstream_model_store_ddc"],
         each["alias"], "yes" if each["enabled"] else "no", each["description"])
        for each in found
    ]  # fmt: skip
    columns = ["UPSTREAM", "STORE", "FEEDS", "INTO", "ALIAS", "ENABLED", "DESCRIPTION"]
    empty = "There are no upstreams; `fedchord store upstreams add DDC --to URL` adds one."
    console().print(table(columns, rows, empty=empty))


@upstreams.command(
    epilog="""\b
Example:
  fedchord store upstreams add ddc:digits --to https://models.example.org --api-key 3f9a --secret-file secret.txt"""
)
@click.argument("ddc")
@click.option("--to", "endpoint", required=True, metavar="URL", help="The service that the model store feeds.")
@click.option("--store", "upstream_ddc", metavar="DDC", help="The model store there.  [default: of the same name]")
@click.option("--api-key", default="", help="The API key there; none for a service that asks for none.")
@click.option(
    "--secret-file",
    type=click.Path(path_type=Path, allow_dash=True, dir_okay=False),
    help="The file with the secret, - for standard input.  [default: the setting upstream_secret, or a prompt]",
)
@click.option(
    "--alias", default=DEFAULT_ALIAS, show_default=True, help="A name to choose it by; this one is taken when none is."
)
@click.option("--description", default="", help="A sentence for people.")
@url_option
@json_option
@click.pass_obj
def add(
    config: Path | None,
    ddc: str,
    endpoint: str,
    upstream_ddc: str | None,
    api_key: str,
    secret_file: Path | None,
    alias: str,
    description: str,
    url: str | None,
    as_json: bool,
) -> None:
    """Let a model store feed another one.

    The secret is kept encrypted and is never shown again. It is no option, for others on the machine can list those.
    """
    secret = _secret(config, secret_file) if api_key else ""
    with reach(config, url) as api:
        added = api.create_upstream_info(
            ddc,
            endpoint,
            upstream_apikey=api_key,
            upstream_secret=secret,
            upstream_model_store_ddc=upstream_ddc or ddc,
            alias=alias,
            description=description,
        )
    if as_json:
        print_json(added)
    else:
        click.echo(f"{ddc} feeds {added['upstream_model_store_ddc']} of {added['upstream_endpoint']}.")


@upstreams.command(
    epilog="""\b
Example:
  fedchord store upstreams remove 5b07"""
)
@click.argument("upstream")
@url_option
@json_option
@click.pass_obj
def remove(config: Path | None, upstream: str, url: str | None, as_json: bool) -> None:
    """Remove an upstream, named by its id."""
    with reach(config, url) as api:
        found = _pick(api, upstream)
        api.delete_upstream_info(found)
    if as_json:
        print_json({"id": found, "removed": True})
    else:
        click.echo(f"Removed upstream {found}.")


@upstreams.command(
    epilog="""\b
Example:
  fedchord store upstreams enable 5b07"""
)
@click.argument("upstream")
@url_option
@json_option
@click.pass_obj
def enable(config: Path | None, upstream: str, url: str | None, as_json: bool) -> None:
    """Use an upstream again."""
    _set_enabled(config, upstream, True, url, as_json=as_json)


@upstreams.command(
    epilog="""\b
Example:
  fedchord store upstreams disable 5b07"""
)
@click.argument("upstream")
@url_option
@json_option
@click.pass_obj
def disable(config: Path | None, upstream: str, url: str | None, as_json: bool) -> None:
    """Keep an upstream, but do not use it."""
    _set_enabled(config, upstream, False, url, as_json=as_json)


def _set_enabled(config: Path | None, upstream: str, enabled: bool, url: str | None, *, as_json: bool) -> None:
    with reach(config, url) as api:
        changed = api.update_upstream_info(_pick(api, upstream), enabled=enabled)
    if as_json:
        print_json(changed)
    else:
        click.echo(f"The upstream {changed['upstream_endpoint']} is {'enabled' if enabled else 'disabled'}.")


def _pick(api: StoreApi, beginning: str) -> str:
    ids = [each["id"] for each in api.list_upstream_info()]
    return pick_id(ids, beginning, what="upstream", command="store upstreams")


def _secret(config: Path | None, file: Path | None) -> str:
    """Return the secret from the file, the setting, or whoever sits at the terminal."""
    if file is not None:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"Cannot read the secret from {file}: {error}.") from error
        return text.strip()
    if set_secret := client_settings(config).upstream_secret.get_secret_value():
        return set_secret
    if not sys.stdin.isatty():
        raise InvalidInput("There is no secret: name a file with --secret-file, or - for standard input.")
    return str(click.prompt("Secret", hide_input=True, err=True))
