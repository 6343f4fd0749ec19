"""Settings come from variables, then one file, then defaults; a mistake is named."""

from pathlib import Path

import pytest

from common.errors import InvalidSettings
from common.settings import Settings


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_every_field_has_a_default_and_a_help_sentence() -> None:
    Settings.load()
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.rstrip().endswith((".", "declined.")), name


def test_a_variable_wins_over_the_file_and_the_file_over_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "fedchord.toml", 'site_name = "from-file"\ns3_bucket = "from-file"\n')
    monkeypatch.setenv("FEDCHORD_S3_BUCKET", "from-variable")
    settings = Settings.load(file)
    assert (settings.site_name, settings.s3_bucket, settings.log_level) == ("from-file", "from-variable", "INFO")


def test_the_file_can_be_named_by_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDCHORD_CONFIG", str(write(tmp_path / "x.toml", 'site_name = "alpha"')))
    assert Settings.load().site_name == "alpha"


def test_relative_paths_in_the_file_are_relative_to_the_file(tmp_path: Path) -> None:
    settings = Settings.load(write(tmp_path / "x.toml", 'blob_folder = "elsewhere"'))
    assert settings.blob_folder == tmp_path / "elsewhere"
    assert settings.signing_key_file == tmp_path / "signing.key"  # a default


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        ("site_slots = 0", "site_slots: Input should be greater than or equal to 1"),
        ("sweep_second = 1", "sweep_second: Extra inputs are not permitted"),
        ('blob_store = "ftp"', "blob_store: Input should be 'folder' or 's3'"),
        ("site_name = ", "not valid TOML"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, text: str, trouble: str) -> None:
    with pytest.raises(InvalidSettings, match=trouble):
        Settings.load(write(tmp_path / "fedchord.toml", text))


def test_a_misspelt_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDCHORD_BROKER", "redis://")
    with pytest.raises(InvalidSettings, match="Unknown variable FEDCHORD_BROKER"):
        Settings.load()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="No such file"):
        Settings.load(tmp_path / "none.toml")


def test_secrets_are_not_shown() -> None:
    settings = Settings(broker_url="redis://:hunter2@host/0", s3_secret_key="hunter2")  # type: ignore[arg-type]
    assert "hunter2" not in repr(settings)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings.load().site_name = "other"  # type: ignore[misc]
