"""Encrypt what the records keep but must not tell: the secrets with which this node calls its upstreams."""

import contextlib
import os
import secrets
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken

from common.errors import InvalidSettings
from store.blobs import disk_errors


class SecretBox:
    """Encrypt with the key in a file that only its owner reads; it is made when it is first needed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def seal(self, text: str) -> str:
        """Return the text encrypted; nothing stays nothing."""
        if not text:
            return ""
        return self._fernet(make=True).encrypt(text.encode()).decode("ascii")

    def open(self, sealed: str) -> str:
        """Return the text; raise InvalidSettings if it was encrypted with another key."""
        if not sealed:
            return ""
        try:
            return self._fernet(make=False).decrypt(sealed.encode("ascii")).decode()
        except InvalidToken as error:
            raise InvalidSettings(
                f"The key in {self.path} is not the one that the upstream's secret was encrypted with; bring that file "
                "back (FEDCHORD_STORE_KEY_FILE names it), or set the upstream's secret again."
            ) from error

    def _fernet(self, *, make: bool) -> Fernet:
        with disk_errors(self.path.parent):
            if make and not self.path.exists():
                self._make_key()
            try:
                return Fernet(self.path.read_bytes().strip())
            except FileNotFoundError as error:
                raise InvalidSettings(
                    f"There is no key {self.path} to decrypt an upstream's secret with; bring the file back "
                    "(FEDCHORD_STORE_KEY_FILE names it), or set the upstream's secret again."
                ) from error
            except ValueError as error:
                raise InvalidSettings(
                    f"{self.path} holds no key of 32 bytes in base64; bring the right file back, or remove it and set "
                    "the upstreams' secrets again."
                ) from error

    def _make_key(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        own = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
        try:
            with open(own, "xb", opener=_private) as file:  # Path.open takes no opener
                file.write(Fernet.generate_key())
            with contextlib.suppress(FileExistsError):  # another process was quicker
                os.link(own, self.path)
        finally:
            own.unlink(missing_ok=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
