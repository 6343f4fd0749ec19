"""A site's kit: the folder that its admin gets, with the site's settings file and its key."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import Conflict
from common.settings import Settings
from common.signing import SigningKey
from coordinator.stack.settings_file import write_settings

SETTINGS_FILE = "site.toml"
KEY_FILE = "signing.key"

_HEADING = "A site of FedChord; start it with FEDCHORD_CONFIG=<this file> celery -A worker worker"


def site_values(
    coordinator: Settings, *, site: str, coordinator_public_key: str, data: Path, trainers: Mapping[str, str]
) -> dict[str, Any]:
    """Return the settings that a site needs to work with the coordinator of these settings."""
    values: dict[str, Any] = {
        "site_name": site,
        "broker_url": coordinator.broker_url.get_secret_value(),
        "coordinator_public_key": coordinator_public_key,
        "signing_key_file": KEY_FILE,
        "site_folder": "state",
        "site_data": data,
    }
    if coordinator.blob_store == "folder":
        values |= {"blob_store": "folder", "blob_folder": coordinator.blob_folder.absolute()}
    else:  # presigned references are all that a site gets, and file references are none of them
        values |= {"blob_store": "s3"}
    return values | {"site_trainers": dict(trainers)}


def write_kit(folder: Path, values: Mapping[str, Any], key: SigningKey | None) -> None:
    """Write a new kit, with the key if it is made here; raise Conflict rather than write over another."""
    for name in (SETTINGS_FILE, KEY_FILE):
        if (folder / name).exists():
            raise Conflict(f"There is a {name} in {folder} already; choose another --folder or move it away.")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if key is not None:
        key.save(folder / KEY_FILE)
    write_settings(folder / SETTINGS_FILE, values, heading=_HEADING)


def renew_kit(folder: Path, values: Mapping[str, Any]) -> None:
    """Bring the settings of a kit up to date; what its admin has added stays."""
    write_settings(folder / SETTINGS_FILE, values, heading=_HEADING)
