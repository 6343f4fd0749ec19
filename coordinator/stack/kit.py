"""A site's kit: the folder that its admin gets, with the site's settings file and its key.

A kit is drafted in a folder `.NAME.new` inside its own, then the site is enrolled, then the draft is renamed to be the
kit. So nothing is enrolled without a kit on the disk, and an interrupted `sites add` goes on with its draft's key.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import Conflict
from common.settings import Settings
from common.signing import SigningKey
from coordinator.services import save_key
from coordinator.stack.settings_file import write_settings
from store.blobs import disk_errors

SETTINGS_FILE = "site.toml"
KEY_FILE = "signing.key"

_HEADING = "A site of FedChord; start it with FEDCHORD_CONFIG=<this file> celery -A worker worker"


def site_values(
    coordinator: Settings,
    *,
    site: str,
    coordinator_public_key: str,
    data: Path,
    trainers: Mapping[str, str],
    broker_url: str | None = None,
) -> dict[str, Any]:
    """Return the settings that a site needs to work with the coordinator of these settings.

    Without a broker URL of its own it gets the coordinator's, and with it the coordinator's rights in the broker.
    """
    values: dict[str, Any] = {
        "site_name": site,
        "broker_url": broker_url or coordinator.broker_url.get_secret_value(),
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


def drafted_key(folder: Path, site: str) -> SigningKey | None:
    """Return the key of a draft that was not finished, or None."""
    draft = _draft(folder, site)
    if not draft.exists():
        return None
    return next((SigningKey.load(path) for path in (draft / KEY_FILE, folder / KEY_FILE) if path.exists()), None)


def draft_kit(folder: Path, site: str, values: Mapping[str, Any], key: SigningKey | None) -> None:
    """Write a draft, with the key if it is made here; raise Conflict if there is a kit in the folder."""
    draft = _draft(folder, site)
    is_new, is_new_folder = not draft.exists(), not folder.exists()
    if is_new:
        for name in (SETTINGS_FILE, KEY_FILE):
            if (folder / name).exists():
                raise Conflict(f"There is a {name} in {folder} already; choose another --folder or move it away.")
    try:
        with disk_errors(folder):
            for each in (folder, draft):
                each.mkdir(parents=True, exist_ok=True, mode=0o700)
            if key is None:
                (draft / KEY_FILE).unlink(missing_ok=True)
            elif not (draft / KEY_FILE).exists() and not (folder / KEY_FILE).exists():
                save_key(key, draft / KEY_FILE)
            write_settings(draft / SETTINGS_FILE, values, heading=_HEADING)
    except BaseException:
        if is_new:  # else the key in it may be enrolled
            shutil.rmtree(folder if is_new_folder else draft, ignore_errors=True)
        raise


def finish_kit(folder: Path, site: str) -> None:
    """Make the draft the kit; the settings file, without which it is none, comes last."""
    draft = _draft(folder, site)
    with disk_errors(folder):
        for name in (KEY_FILE, SETTINGS_FILE):
            if (draft / name).exists():
                (draft / name).replace(folder / name)
        shutil.rmtree(draft)


def renew_kit(folder: Path, values: Mapping[str, Any]) -> None:
    """Bring the settings of a kit up to date; what its admin has added stays."""
    write_settings(folder / SETTINGS_FILE, values, heading=_HEADING)


def _draft(folder: Path, site: str) -> Path:
    return folder / f".{site}.new"
