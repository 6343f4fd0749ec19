"""The command `store serve`: the model store's service on its own."""

import logging
from pathlib import Path

import click

from common.errors import Conflict, InvalidInput, InvalidSettings
from common.logs import set_up_logs
from common.settings import ENV_PREFIX, Settings
from coordinator.cli.output import default_settings_file, json_option, print_json
from coordinator.cli.reach import STORE_FOLDER, names_records
from coordinator.stack.folder import check_path
from coordinator.stack.settings_file import write_settings
from store.blobs import disk_errors
from store.opening import open_store

_ANY_ADDRESS = ("0.0.0.0", "::", "")  # noqa: S104  # compared with, not bound
_SETTINGS_FILE = "fedchord.toml"
_HEADING = "A model store; `fedchord store serve` made this file and leaves what is added."


@click.command(
    epilog="""\b
Example:
  fedchord store serve
  FEDCHORD_HTTP_ACCESS=keys fedchord store serve --host 0.0.0.0 --port 8790"""
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"The folder of a store of its own, made at the first start.  [default: {STORE_FOLDER}]",
)
@click.option("--host", help="The address to listen at.  [default: the setting http_host]")
@click.option(
    "--port", type=click.IntRange(0, 65535), help="The port; 0 takes any free one.  [default: the setting http_port]"
)
@json_option
@click.pass_obj
def serve(config: Path | None, folder: Path | None, host: str | None, port: int | None, as_json: bool) -> None:
    """Serve the model store over HTTP, until Ctrl-C.

    The settings are those of --config, or of the variables if they name a database. Without either, the store has a
    folder of its own: settings file, records and models. Where http_access is "open", which is the default, everybody
    on this machine may call and nobody else can; where it is "keys", tenants call with an API key and secret.
    """
    from store.service.app import make_app  # the HTTP server's libraries, which the other commands of `store`
    from store.service.serving import serve as serve_app  # do without, cost 0.3 s

    if config is not None and folder is not None:
        raise InvalidInput("--config and --folder: the settings file says where the records are; name one of the two.")
    settings = _settings(config, folder)
    changes = {"http_host": host, "http_port": port}
    settings = settings.model_copy(update={name: value for name, value in changes.items() if value is not None})

    if not logging.getLogger().isEnabledFor(logging.DEBUG):  # which --debug asks for
        set_up_logs(settings.log_level, settings.log_format)

    def ready(url: str) -> None:
        if as_json:
            print_json({"url": url, "http_access": settings.http_access})
        else:
            others = " and at this machine's other addresses" if settings.http_host in _ANY_ADDRESS else ""
            click.echo(f"The model store listens at {url}{others}\n{_who(settings, config, folder)}")

    with open_store(settings) as store:
        serve_app(make_app(store), settings, ready=ready)


def _settings(config: Path | None, folder: Path | None) -> Settings:
    """Return the settings; make the folder and its settings file if it is the first start."""
    if config is not None:
        return Settings.load(config)
    if folder is None and names_records(settings := Settings.load()):
        return settings
    if folder is None and default_settings_file() is not None:
        raise Conflict(
            "There is a stack in this folder, with a service of its own that `fedchord status` shows; for a model "
            "store beside it, name another folder with --folder."
        )
    path = check_path((folder or STORE_FOLDER).resolve())
    file = path / _SETTINGS_FILE
    values = {"database_url": f"sqlite:///{path / 'fedchord.db'}"}
    with disk_errors(path.parent):
        path.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_settings(file, values, heading=_HEADING)
    settings = Settings.load(file)
    if names_records(Settings.load()):  # variables win over the file, which is not what --folder means
        raise InvalidSettings(
            f"{ENV_PREFIX}DATABASE_URL is set, but {path} has its own; unset it, or leave --folder out."
        )
    return settings


def _who(settings: Settings, config: Path | None, folder: Path | None) -> str:
    """Say who may call."""
    file = config or (folder / _SETTINGS_FILE if folder is not None else None)
    if settings.http_access == "open":
        return (
            "It is open to everybody on this machine, and to nobody else: no key is asked for. With the setting "
            'http_access = "keys" it asks for them.'
        )
    named = f" --config {file}" if file is not None else ""
    return f"It asks for an API key and secret; `fedchord{named} store tenants add NAME` makes them."
