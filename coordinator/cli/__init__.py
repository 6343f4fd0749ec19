"""The command line `fedchord`."""

from coordinator.cli.entry import main

__all__ = ["main"]
