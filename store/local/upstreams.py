"""The local API's methods on upstreams: which there are, and what goes up to them and comes down."""

from typing import Any

from sqlalchemy import Connection

from common.errors import AccessDenied, NotFound
from store.database import reading, writing
from store.documents import upstream_document
from store.local.base import LocalMethods
from store.model_stores import check_owner, visible_stores
from store.upstreams import (
    DEFAULT_ALIAS,
    Upstream,
    add_upstream,
    get_upstream,
    no_upstream,
    remove_upstream,
    update_upstream,
    upstreams,
)


class UpstreamMethods(LocalMethods):
    """Manage the upstreams of model stores; the secret is never given out.

    Owners see them and may remove them. Only operators say where they lead: this node calls that address, and could be
    made to call what its tenants cannot reach themselves.
    """

    def create_upstream_info(
        self,
        model_store_ddc: str,
        upstream_endpoint: str,
        upstream_apikey: str = "",
        upstream_secret: str = "",
        upstream_model_store_ddc: str = "",
        alias: str = DEFAULT_ALIAS,
        description: str = "",
        enabled: bool = True,
    ) -> dict[str, Any]:
        """Record an upstream of the model store and return its upstream_info."""
        with writing(self.store.engine) as connection:
            check_owner(connection, self.caller, model_store_ddc)
            self._check_operator()
            added = add_upstream(
                connection,
                self.store.box,
                model_store_ddc,
                url=upstream_endpoint,
                api_key=upstream_apikey,
                secret=upstream_secret,
                upstream_store=upstream_model_store_ddc,
                alias=alias,
                description=description,
                enabled=enabled,
            )
        return upstream_document(added)

    def update_upstream_info(
        self,
        id: str,
        upstream_endpoint: str | None = None,
        upstream_apikey: str | None = None,
        upstream_secret: str | None = None,
        upstream_model_store_ddc: str | None = None,
        alias: str | None = None,
        description: str | None = None,
        enabled: bool | None = None,
    ) -> dict[str, Any]:
        """Change what is given of an upstream and return its upstream_info."""
        asked = {
            "url": upstream_endpoint,
            "api_key": upstream_apikey,
            "secret": upstream_secret,
            "upstream_store": upstream_model_store_ddc,
            "alias": alias,
            "description": description,
            "enabled": enabled,
        }
        changes = {name: value for name, value in asked.items() if value is not None}
        with writing(self.store.engine) as connection:
            self._own(connection, id)
            self._check_operator()
            return upstream_document(update_upstream(connection, self.store.box, id, **changes))

    def delete_upstream_info(self, id: str, raise_if_no_exists: bool = True) -> int:
        """Forget the upstream and return 1; of a missing one return 0, or raise NotFound as by default."""
        with writing(self.store.engine) as connection:
            try:
                self._own(connection, id)
            except NotFound:
                if raise_if_no_exists:
                    raise
                return 0
            return remove_upstream(connection, id)

    def get_upstream_info(self, id: str) -> dict[str, Any]:
        """Return the upstream_info."""
        with reading(self.store.engine) as connection:
            return upstream_document(self._own(connection, id))

    def list_upstream_info(self, model_store_ddc: str | None = None) -> list[dict[str, Any]]:
        """Return the upstream_info of the model store's upstreams, or of all that are the caller's."""
        with reading(self.store.engine) as connection:
            if model_store_ddc is not None:
                check_owner(connection, self.caller, model_store_ddc)
            found = upstreams(connection, model_store_ddc)
            owned = {
                store.name
                for store in visible_stores(connection, self.caller)
                if self.caller.is_operator or store.tenant_id == self.caller.tenant_id
            }
        return [upstream_document(each) for each in found if each.store in owned]

    def _own(self, connection: Connection, id: str) -> Upstream:
        """Return the upstream; raise NotFound or AccessDenied unless its model store is the caller's."""
        found = get_upstream(connection, id)
        try:
            check_owner(connection, self.caller, found.store)
        except NotFound:  # whose words would name a model store that the caller cannot see
            raise no_upstream(id) from None
        return found

    def _check_operator(self) -> None:
        if not self.caller.is_operator:
            raise AccessDenied(
                "Only an operator says where a model store's upstream is; ask the operator of this node."
            )
