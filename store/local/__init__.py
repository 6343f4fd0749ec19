"""The methods of the model store on this node's own records."""

from store.local.api import LocalApi

__all__ = ["LocalApi"]
