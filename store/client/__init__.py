"""The Python client of a model store's service."""

from store.client.api import Api, FlEvents, set_logger

__all__ = ["Api", "FlEvents", "set_logger"]
