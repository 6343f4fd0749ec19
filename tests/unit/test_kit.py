import stat
from pathlib import Path

import pytest

from common.errors import Conflict, DiskFull
from common.signing import SigningKey
from coordinator.stack import kit
from coordinator.stack.kit import draft_kit, drafted_key, finish_kit

VALUES = {"site_name": "clinic-a"}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_finished_draft_is_the_kit_and_nothing_else(tmp_path: Path) -> None:
    folder, key = tmp_path / "clinic-a", SigningKey.generate()
    draft_kit(folder, "clinic-a", VALUES, key)
    finish_kit(folder, "clinic-a")
    assert files(folder) == ["signing.key", "site.toml"]
    assert SigningKey.load(folder / "signing.key").public_key == key.public_key
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert drafted_key(folder, "clinic-a") is None


def test_an_interrupted_draft_is_gone_on_with_and_keeps_its_key(tmp_path: Path) -> None:
    key = SigningKey.generate()
    draft_kit(tmp_path, "clinic-a", VALUES, key)
    found = drafted_key(tmp_path, "clinic-a")
    assert found is not None
    assert found.public_key == key.public_key
    assert drafted_key(tmp_path, "clinic-b") is None
    draft_kit(tmp_path, "clinic-a", {**VALUES, "site_slots": 2}, found)
    finish_kit(tmp_path, "clinic-a")
    assert files(tmp_path) == ["signing.key", "site.toml"]
    assert SigningKey.load(tmp_path / "signing.key").public_key == key.public_key
    assert "site_slots = 2" in (tmp_path / "site.toml").read_text()


def test_a_kit_that_was_interrupted_between_its_two_files_is_finished(tmp_path: Path) -> None:
    key = SigningKey.generate()
    draft_kit(tmp_path, "clinic-a", VALUES, key)
    (tmp_path / ".clinic-a.new" / "signing.key").rename(tmp_path / "signing.key")
    found = drafted_key(tmp_path, "clinic-a")
    assert found is not None
    draft_kit(tmp_path, "clinic-a", VALUES, found)
    finish_kit(tmp_path, "clinic-a")
    assert files(tmp_path) == ["signing.key", "site.toml"]
    assert SigningKey.load(tmp_path / "signing.key").public_key == key.public_key


def test_a_key_of_an_unfinished_draft_is_not_handed_out_if_the_site_has_its_own(tmp_path: Path) -> None:
    draft_kit(tmp_path, "clinic-a", VALUES, SigningKey.generate())
    draft_kit(tmp_path, "clinic-a", VALUES, None)
    finish_kit(tmp_path, "clinic-a")
    assert files(tmp_path) == ["site.toml"]


@pytest.mark.parametrize("name", ["signing.key", "site.toml"])
def test_what_is_in_the_folder_is_neither_used_nor_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    assert drafted_key(tmp_path, "clinic-a") is None
    with pytest.raises(Conflict, match=name):
        draft_kit(tmp_path, "clinic-a", VALUES, SigningKey.generate())
    assert files(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "precious"


def test_a_draft_that_cannot_be_written_leaves_only_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    started, new = tmp_path / "started", tmp_path / "new"
    key = SigningKey.generate()
    draft_kit(started, "clinic-a", VALUES, key)
    monkeypatch.setattr(kit, "write_settings", full)
    for folder, its_key in ((new, SigningKey.generate()), (started, key)):
        with pytest.raises(DiskFull):
            draft_kit(folder, "clinic-a", VALUES, its_key)
    assert not new.exists()
    found = drafted_key(started, "clinic-a")
    assert found is not None
    assert found.public_key == key.public_key
