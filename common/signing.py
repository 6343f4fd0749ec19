"""Sign and check messages with Ed25519 keys (RFC 8032)."""

import base64
import binascii
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from common.errors import BadSignature, InvalidSettings

_KEY_BYTES = 32  # raw keys, RFC 8032 section 5.1.5


class SigningKey:
    """A private key: what a process signs its messages with."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private

    @classmethod
    def generate(cls) -> "SigningKey":
        """Make a new key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> "SigningKey":
        """Read the key; raise InvalidSettings when the file is missing or holds no key."""
        try:
            text = path.read_text("ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidSettings(
                f"Cannot read the signing key {path}: {error}. Correct signing_key_file; "
                "`fedchord up` and `fedchord keys new` make a coordinator's key, `fedchord sites add` a site's."
            ) from error
        return cls(Ed25519PrivateKey.from_private_bytes(_decode(text, f"The signing key {path}")))

    def save(self, path: Path) -> None:
        """Write the key, readable by its owner only; never over another key."""
        raw = self._private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(base64.b64encode(raw).decode("ascii") + "\n")

    @property
    def public_key(self) -> str:
        """Return the public key as base64 text, 44 characters."""
        raw = self._private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        return base64.b64encode(raw).decode("ascii")

    def sign(self, data: bytes) -> bytes:
        """Return the 64 byte signature of the data."""
        return self._private.sign(data)


def check_public_key(text: str) -> str:
    """Return the key; raise InvalidSettings unless it is base64 text of an Ed25519 public key."""
    _public_key(text)
    return text


def verify(public_key: str, signature: bytes, data: bytes) -> None:
    """Raise BadSignature unless the signature of the data was made with the key's other half."""
    try:
        _public_key(public_key).verify(signature, data)
    except InvalidSignature as error:
        raise BadSignature() from error


def _public_key(text: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(_decode(text, "The public key"))


def _decode(text: str, what: str) -> bytes:
    try:
        raw = base64.b64decode(text.strip(), validate=True)
    except binascii.Error as error:
        raise InvalidSettings(f"{what} is not base64 text; copy it again.") from error
    if len(raw) != _KEY_BYTES:
        raise InvalidSettings(f"{what} has {len(raw)} bytes instead of {_KEY_BYTES}; copy it again.")
    return raw
