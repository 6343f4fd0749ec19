"""Look whether the operator's own functions that choose sites can be loaded."""

from collections.abc import Iterator

from common.errors import InvalidSettings
from common.settings import Settings
from coordinator.checks.finding import Finding, fault, ok
from coordinator.choosing import load_chooser


def check_choosers(settings: Settings) -> Iterator[Finding]:
    """Load each; without any there is nothing to say."""
    for name in sorted(settings.choosers):
        try:
            load_chooser(name, settings.choosers)
        except InvalidSettings as error:
            yield fault(f"chooser {name}", error.message)
        else:
            yield ok(f"chooser {name}", f"{settings.choosers[name]} can be loaded.")
