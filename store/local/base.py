"""What every method of the local API stands on: an open store, and who asks."""

from sqlalchemy import Connection

from common.errors import NotFound
from store.model_stores import check_access
from store.models import ModelInfo, get_model
from store.opening import OpenStore
from store.tenants import Caller

_MAX_ID_CHARACTERS = 200


class LocalMethods:
    """Methods for one caller on this node's own records."""

    def __init__(self, store: OpenStore, caller: Caller) -> None:
        self.store = store
        self.caller = caller

    def _model(self, connection: Connection, model_store_ddc: str, model_id: str, *, write: bool = False) -> ModelInfo:
        """Return a model of the model store; raise what `check_access` raises, NotFound for another store's model."""
        check_access(connection, self.caller, model_store_ddc, write=write)
        if len(model_id) <= _MAX_ID_CHARACTERS and model_id.isprintable():  # others PostgreSQL does not even look up
            try:
                model = get_model(connection, model_id)
            except NotFound:
                pass
            else:
                if model.store == model_store_ddc:
                    return model
        raise NotFound(f"There is no model {model_id[:80]!a} in {model_store_ddc}; get_models lists all.")
