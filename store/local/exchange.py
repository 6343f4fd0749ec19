"""The local API's methods that reach other nodes: models go up and come down, parties register upwards."""

from collections.abc import Sequence
from typing import Any

from store.exchange import models, offers, parties
from store.local.base import LocalMethods


class ExchangeMethods(LocalMethods):
    """Exchange models and parties with the nodes above and below."""

    def feedback(self, model_store_ddc: str, model_id: str, upstream: str | None = None) -> dict[str, Any]:
        """Send the model to the model store's upstream, by its alias if there are several; return its model_info."""
        return models.feedback(self.store, self.caller, model_store_ddc, model_id, upstream)

    def request_transfer(self, model_store_ddc: str, upstream: str | None = None) -> dict[str, Any]:
        """Bring the upstream's newest aggregated model into the model store and return its model_info here."""
        return models.request_transfer(self.store, self.caller, model_store_ddc, upstream)

    def proxy_request_transfer_info(self, model_store_ddc: str = "", upstream: str | None = None) -> dict[str, Any]:
        """Return the model_info of the upstream's newest aggregated model; a node without upstream answers itself."""
        return models.proxy_request_transfer_info(self.store, self.caller, model_store_ddc, upstream)

    def get_parties(self, *, here: bool = False) -> list[dict[str, Any]]:
        """Return the party_info of the parties that are registered at the upstream, or `here`, at this node."""
        return parties.get_parties(self.store, self.caller, here=here)

    def create_party(self, description: str = "") -> dict[str, Any]:
        """Register this node's organisation as a party at the upstream, and above; return its party_info there."""
        return parties.create_party(self.store, self.caller, description)

    def delete_party(self, id: str) -> int:
        """Delete the party from the upstream, and above; return how many were deleted, 0 or 1."""
        return parties.delete_party(self.store, self.caller, id)

    def get_path(self, model_store_ddc: str, via: Sequence[str] = ()) -> list[dict[str, str]]:
        """Return this model store and those above it, each with its node."""
        return offers.get_path(self.store, self.caller, model_store_ddc, via)

    def offer_model(self, model_store_ddc: str, model: dict[str, Any]) -> dict[str, Any]:
        """Record a node's model that is fed back, or say which of its blobs have to be sent first."""
        return offers.offer_model(self.store, self.caller, model_store_ddc, model)

    def register_party(
        self,
        id: str,
        tenant_id: str,
        tenant_name: str,
        description: str = "",
        hop_count: int = 1,
        via: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Record a party that a node below registers, and register it above; return its party_info."""
        return parties.register_party(self.store, self.caller, id, tenant_id, tenant_name, description, hop_count, via)

    def unregister_party(self, id: str, via: Sequence[str] = ()) -> int:
        """Forget a party that a node below registered, here and above; return how many were forgotten here."""
        return parties.unregister_party(self.store, self.caller, id, via)
