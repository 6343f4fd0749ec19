"""The model store's methods on this node's own records, as one caller may use them.

The HTTP service and the local command line call these; `store.client.Api` has the same ones for a service elsewhere.
"""

from importlib.metadata import version
from typing import Any

from common.errors import NotFound
from store.database import reading, writing
from store.documents import store_document
from store.local.exchange import ExchangeMethods
from store.local.models import ModelMethods
from store.local.upstreams import UpstreamMethods
from store.model_stores import OPERATOR, add_store, check_access, check_owner, remove_store, visible_stores
from store.new_models import check_description


class LocalApi(ModelMethods, UpstreamMethods, ExchangeMethods):
    """Every method, for one caller; access is checked first in each."""

    def get_server_version(self) -> str:
        """Return the version of this installation."""
        return version("fedchord")

    def initialize_model_store(self, model_store_ddc: str, description: str = "") -> dict[str, Any]:
        """Create the model store, unless the caller has it already, and return its ddc_info."""
        owner = OPERATOR if self.caller.is_operator else self.caller.tenant_id
        with writing(self.store.engine) as connection:
            return store_document(
                add_store(connection, model_store_ddc, tenant_id=owner, description=check_description(description))
            )

    def exists_store(self, model_store_ddc: str) -> bool:
        """Return whether there is a model store of that name that the caller may read."""
        with reading(self.store.engine) as connection:
            try:
                check_access(connection, self.caller, model_store_ddc, write=False)
            except NotFound:
                return False
        return True

    def delete_store(self, model_store_ddc: str, raise_if_no_exists: bool = True) -> int:
        """Delete the model store with its models and return 1; of a missing one return 0, or raise NotFound."""
        with writing(self.store.engine) as connection:
            try:
                check_owner(connection, self.caller, model_store_ddc)
                remove_store(connection, model_store_ddc)
            except NotFound:
                if raise_if_no_exists:
                    raise
                return 0
        return 1

    def get_stores(self) -> list[dict[str, Any]]:
        """Return the ddc_info of every model store that the caller may read, by name."""
        with reading(self.store.engine) as connection:
            return [store_document(store) for store in visible_stores(connection, self.caller)]
