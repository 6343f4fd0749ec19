"""Keys are made once, kept private, and refused when they are not keys."""

from pathlib import Path

import pytest

from common.errors import BadSignature, InvalidSettings
from common.signing import SigningKey, check_public_key, verify


def test_a_saved_key_signs_as_before_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "signing.key"
    key = SigningKey.generate()
    key.save(path)
    verify(key.public_key, SigningKey.load(path).sign(b"data"), b"data")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_key_is_never_written_over_another(tmp_path: Path) -> None:
    path = tmp_path / "signing.key"
    SigningKey.generate().save(path)
    with pytest.raises(FileExistsError):
        SigningKey.generate().save(path)


def test_other_data_fails_the_check() -> None:
    key = SigningKey.generate()
    with pytest.raises(BadSignature):
        verify(key.public_key, key.sign(b"data"), b"other data")


@pytest.mark.parametrize(
    ("text", "trouble"),
    [("", "has 0 bytes instead of 32"), ("not base64!", "not base64 text"), ("AAAA", "has 3 bytes instead of 32")],
)
def test_what_is_no_key_is_refused_with_the_reason(text: str, trouble: str) -> None:
    with pytest.raises(InvalidSettings, match=trouble):
        check_public_key(text)


def test_a_missing_key_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="`fedchord up` and `fedchord keys new` make a coordinator's key"):
        SigningKey.load(tmp_path / "none.key")
