"""The command `serve`: the coordinator's HTTP service."""

import logging
from pathlib import Path

import click

from common.logs import set_up_logs
from common.settings import Settings
from coordinator.cli.output import coordinator_settings, json_option, print_json
from coordinator.http import make_http_app
from coordinator.services import open_services
from store.opening import open_store
from store.service.serving import serve as serve_app

_ACCESS = {
    "open": "open to everybody on this machine, who may do everything",
    "keys": "whoever calls must send the API key and secret of a tenant",
}


@click.command(
    epilog="""\b
Example:
  fedchord serve
  fedchord --config fedchord.toml serve --host 0.0.0.0 --port 8790"""
)
@click.option("--host", help="The address to listen at.  [default: the setting http_host]")
@click.option("--port", type=click.IntRange(0, 65535), help="The port; 0 takes any.  [default: the setting http_port]")
@json_option
@click.pass_obj
def serve(config: Path | None, host: str | None, port: int | None, as_json: bool) -> None:
    """Serve the coordinator's models and jobs over HTTP.

    The model store's own methods, uploads and downloads, and beside them job.submit, job.get, job.list and job.abort
    for operators. An embedded stack has this service already; `fedchord status` shows its URL. Ctrl-C or SIGTERM ends
    it.
    """
    settings = _settings(config, host, port)
    if not logging.getLogger().isEnabledFor(logging.DEBUG):  # which --debug asks for
        set_up_logs(settings.log_level, settings.log_format)

    def ready(url: str) -> None:
        if as_json:
            print_json({"url": url, "http_access": settings.http_access})
        else:
            click.echo(f"Serving {url} ({_ACCESS[settings.http_access]}).")

    # Models can be had while the broker is away; a job is then refused.
    with open_services(settings, needs_broker=False) as services, open_store(settings) as store:
        serve_app(make_http_app(services, store), settings, ready=ready)


def _settings(config: Path | None, host: str | None, port: int | None) -> Settings:
    settings = coordinator_settings(config)
    wanted = {"http_host": host, "http_port": port}
    return settings.model_copy(update={name: value for name, value in wanted.items() if value is not None})
