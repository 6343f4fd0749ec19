"""The coordinator's Celery app: `celery -A coordinator worker`, `celery -A coordinator flower`."""

import sys
from typing import Any

from celery.signals import celeryd_init, setup_logging

from common.broker import make_coordinator_app
from common.errors import FedChordError
from common.logs import set_up_logs
from common.settings import Settings
from coordinator.services import attach_services, open_services
from coordinator.sweeper import Sweeper

try:
    settings = Settings.load()
except FedChordError as error:
    sys.exit(f"fedchord: {error.message}")

app = make_coordinator_app(settings)
app.steps["worker"].add(Sweeper)


@setup_logging.connect(weak=False)
def _set_up_logs(**_: Any) -> None:
    set_up_logs(settings.log_level, settings.log_format)


@celeryd_init.connect(weak=False)
def _open_services(**_: Any) -> None:
    """Open the services when a worker starts, and only then: Flower needs the queues alone."""
    try:
        attach_services(app, open_services(settings, app=app))
    except FedChordError as error:
        sys.exit(f"fedchord: {error.message}")
