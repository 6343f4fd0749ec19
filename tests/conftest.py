"""Keep the developer's own settings out of every test."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_settings_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove every FEDCHORD_… variable."""
    for name in [name for name in os.environ if name.startswith("FEDCHORD_")]:
        monkeypatch.delenv(name)
