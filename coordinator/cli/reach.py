"""Where a command finds the model store: the records on this machine, or a service elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import click

from common.errors import NotFound
from common.settings import Settings
from coordinator.cli.output import default_settings_file
from store.client import Api
from store.local import LocalApi
from store.opening import OpenStore, open_store
from store.tenants import operator

STORE_FOLDER = Path("fedchord-store")  # where `fedchord store serve` keeps a store of its own

StoreApi: TypeAlias = LocalApi | Api  # the same methods, on the records here or over a service

url_option = click.option(
    "--url",
    metavar="URL",
    help="Ask the service there, with the settings store_api_key and store_secret.  "
    "[default: the records on this machine, as their operator]",
)


@contextmanager
def reach(config: Path | None, url: str | None) -> Iterator[StoreApi]:
    """Open the service at the URL, or the records that the settings name."""
    if url is None:
        with open_local(config) as store:
            yield LocalApi(store, operator(store.settings))
        return
    settings = client_settings(config)
    with Api(url, api_key=settings.store_api_key, secret=settings.store_secret.get_secret_value()) as api:
        yield api


@contextmanager
def open_local(config: Path | None) -> Iterator[OpenStore]:
    """Open the records that the settings name; raise NotFound where nothing names any, rather than make new ones."""
    settings = client_settings(config)
    if config is None and _file_here() is None and not names_records(settings):
        raise NotFound(
            f"There is no stack and no {STORE_FOLDER}/ in this folder; name the settings file with --config, or make "
            "a model store with `fedchord store serve`."
        )
    with open_store(settings) as store:
        yield store


def client_settings(config: Path | None) -> Settings:
    """Return the settings of this folder: the named file, or the stack's, or the store's, or the variables alone."""
    return Settings.load(config or _file_here())


def names_records(settings: Settings) -> bool:
    """Return whether a settings file or a variable says where the records are."""
    return "database_url" in settings.model_fields_set


def _file_here() -> Path | None:
    """Return the settings file of the stack in this folder, or else of the store."""
    store = STORE_FOLDER / "fedchord.toml"
    return default_settings_file() or (store if store.exists() else None)
