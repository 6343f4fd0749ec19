"""The site's Celery app, at the process's edge: `celery -A worker worker` alone starts a site."""

import sys
from pathlib import Path
from typing import Any

from celery import Celery
from celery.signals import celeryd_init, setup_logging

from common.broker import connect, make_site_app
from common.errors import FedChordError, InvalidSettings
from common.logs import set_up_logs
from common.queues import check_site_name
from common.settings import Settings
from common.signing import SigningKey, check_public_key
from worker.heartbeat import heartbeat_step
from worker.site import prepare_site
from worker.trainers import Trainers


def make_app(settings: Settings) -> Celery:
    """Return the app of the site that the settings describe; raise InvalidSettings."""
    if not settings.site_name:
        raise InvalidSettings("No site_name: set FEDCHORD_SITE_NAME, or name the site's file in FEDCHORD_CONFIG.")
    check_site_name(settings.site_name)
    app = make_site_app(settings)
    app.steps["worker"].add(heartbeat_step(settings))
    return app


def check_site(settings: Settings) -> None:
    """Raise an error that says what to correct unless a site can start with the settings; make its folders."""
    if not settings.coordinator_public_key:
        raise InvalidSettings("No coordinator_public_key: set it to what `fedchord sites add` printed for this site.")
    check_public_key(settings.coordinator_public_key)
    SigningKey.load(settings.signing_key_file)
    Trainers(settings.site_trainers).check()
    connect(settings).close()
    prepare_site(settings)


@setup_logging.connect
def _set_up_logs(**_: Any) -> None:
    set_up_logs(settings.log_level, settings.log_format)


@celeryd_init.connect
def _check_site(**_: Any) -> None:
    try:
        check_site(settings)
    except FedChordError as error:
        sys.exit(error.message)


if (here := str(Path.cwd())) not in sys.path:
    sys.path.append(here)  # a trainer may lie in the folder that the worker is started in

try:
    settings = Settings.load()
    app = make_app(settings)
except FedChordError as error:
    sys.exit(error.message)
