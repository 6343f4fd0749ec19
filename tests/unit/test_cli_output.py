"""What the commands have in common: sizes for people, and which settings they take."""

from pathlib import Path

import pytest

from common.errors import NotFound
from coordinator.cli.output import coordinator_settings, size_text


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (19_552, "19.6 kB"),
        (999_999, "1000 kB"),
        (123_456_789, "123 MB"),
        (2_500_000_000, "2.5 GB"),
        (1_234_000_000_000, "1234 GB"),
    ],
)
def test_a_size_is_shown_in_the_largest_unit_that_fits(size: int, shown: str) -> None:
    assert size_text(size) == shown


def test_a_folder_without_a_stack_is_told_rather_than_given_a_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound, match="no stack in this folder"):
        coordinator_settings(None)
    assert list(tmp_path.iterdir()) == []


def test_a_variable_is_enough_to_name_a_coordinator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDCHORD_DATABASE_URL", "sqlite:///elsewhere.db")
    assert coordinator_settings(None).database_url.get_secret_value() == "sqlite:///elsewhere.db"
