"""Write what a stack's processes read, and enroll its sites."""

from common.errors import InvalidSettings
from common.settings import ENV_PREFIX, Settings
from common.signing import SigningKey
from coordinator.services import make_key
from coordinator.stack.folder import Stack, StackFolder
from coordinator.stack.kit import KEY_FILE, renew_kit, site_values
from coordinator.stack.programs import write_supervisor_file
from coordinator.stack.settings_file import write_settings
from coordinator.stack.valkey import broker_url, write_valkey_file
from store.database import open_database, upgrade, writing
from store.parties import enroll_site, set_enabled
from store.parties import sites as enrolled_sites

_LEFT_OUT = "left out at the last `fedchord up`"


def configure(folder: StackFolder, stack: Stack) -> Settings:
    """Write every file that the processes read, and enroll the sites; return the coordinator's settings.

    The stack's record comes last: a new folder without one is taken away again.
    """
    folder.logs.mkdir(exist_ok=True)
    key = make_key(folder.key_file)
    values = {
        "broker_url": broker_url(stack),
        "database_url": f"sqlite:///{folder.database_file}",
        "blob_store": "folder",
        "blob_folder": "blobs",
        "cache_folder": "cache",
        "http_port": stack.http_port or 0,
        "store_key_file": "store.key",
        "signing_key_file": folder.key_file.name,
        "log_folder": folder.logs.name,
    }
    write_settings(
        folder.settings_file,
        values,
        heading="The coordinator of an embedded stack; `fedchord up` keeps these lines, and leaves what is added.",
    )
    settings = Settings.load(folder.settings_file)
    for secret, ours in ((settings.broker_url, "broker_url"), (settings.database_url, "database_url")):
        if secret.get_secret_value() != values[ours]:
            raise InvalidSettings(
                f"{ENV_PREFIX}{ours.upper()} is set, but a stack has its own; unset it and try again."
            )
    write_valkey_file(folder, stack)
    write_supervisor_file(folder, stack, log_megabytes=settings.keep_logs_megabytes)
    _enroll(folder, stack, settings, key)
    folder.save(stack)
    return settings


def _enroll(folder: StackFolder, stack: Stack, settings: Settings, coordinator_key: SigningKey) -> None:
    """Give every site its kit, and record its public key."""
    engine = open_database(settings.database_url.get_secret_value())
    try:
        upgrade(engine)
        for site in stack.sites:
            kit = folder.site(site)
            values = site_values(
                settings,
                site=site,
                coordinator_public_key=coordinator_key.public_key,
                data=stack.site_data / site if stack.site_data else kit / "data",
                trainers=stack.trainers,
            )
            kit.mkdir(parents=True, exist_ok=True, mode=0o700)
            (kit / "data").mkdir(exist_ok=True)
            key = make_key(kit / KEY_FILE)
            renew_kit(kit, values)
            with writing(engine) as connection:
                party = enroll_site(connection, site, key.public_key, description="a site of the embedded stack")
                if party.reason == _LEFT_OUT:
                    set_enabled(connection, site, True)
        with writing(engine) as connection:
            for party in enrolled_sites(connection, enabled=True):
                if party.site not in stack.sites and (folder.site(party.site or "") / KEY_FILE).exists():
                    set_enabled(connection, party.site or "", False, _LEFT_OUT)  # or a job would wait for it
    finally:
        engine.dispose()
