"""The coordinator's HTTP service: the model store's own, and `job.*` beside its methods."""

from starlette.applications import Starlette

from coordinator.job_methods import JobMethods
from coordinator.services import Services
from store.opening import OpenStore
from store.service.app import make_app


def make_http_app(services: Services, store: OpenStore) -> Starlette:
    """Return the service of the coordinator whose models the store holds."""
    return make_app(store, more_methods=JobMethods(services).by_name())
