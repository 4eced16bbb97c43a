"""API keys: a file of their hashes. A key is 128 random bits, so one SHA-256 of it is as good as any slower hash."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import UsageError, VegaEdgeError, unknown
from ..whole_file import writing

_log = logging.getLogger(__name__)
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class Key:
    """name: for people and logs. sha256: of the key. created: ISO 8601, UTC."""

    name: str
    sha256: str
    created: str


class KeyFile:
    """Read again when it has changed, so that a key that is revoked is refused a second later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp, self._looked = _stamp(path), time.monotonic()  # before it is read: what changes meanwhile is seen
        self._keys = load(path)

    def owner(self, key: str) -> str | None:
        """The name of the key's owner; None for a key that is not in the file. Takes as long for any key."""
        return self.owner_of(digest_of(key))

    def owner_of(self, digest: str) -> str | None:
        """As `owner`, of a key's SHA-256: what a connection that stays open asks again."""
        self._refresh()
        found = None
        for known in self._keys:
            if hmac.compare_digest(known.sha256, digest):
                found = known.name
        return found

    def _refresh(self) -> None:
        if time.monotonic() - self._looked < _LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        if stamp is None:
            self._keys = []
            _log.error("%s was deleted, so that no key is known now", self._path)
            return
        try:
            self._keys = load(self._path)
        except VegaEdgeError as error:  # such as one that is half written: it is read again when it changes
            _log.error("%s; the keys that were in it stay", error)


def load(path: Path) -> list[Key]:
    """VegaEdgeError for a file that is missing or is not one of keys."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        return [_checked(Key(**entry)) for entry in written["keys"]]
    except FileNotFoundError:
        raise VegaEdgeError(
            f"{path} does not exist; make it: vega-edge serve keys add NAME --api-keys {path}"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise VegaEdgeError(f"{path} is not a file of keys: {error}") from error


def _checked(key: Key) -> Key:
    """A hash that is none would fail each time that a key is compared."""
    if not isinstance(key.name, str) or not isinstance(key.sha256, str) or not re.fullmatch("[0-9a-f]{64}", key.sha256):
        raise ValueError(f"the key {key.name!r} has no sha256 of 64 lower-case hex digits")
    return key


def add(path: Path, name: str) -> str:
    """Makes a key and returns it: this is the only time that it can be seen."""
    if not re.fullmatch(r"[\w.@-]{1,64}", name):
        raise UsageError(f"a key's name is 1 to 64 letters, digits, or _ . @ -, got {name!r}")
    keys = load(path) if path.exists() else []
    if any(key.name == name for key in keys):
        raise UsageError(f"{path} has a key named {name!r}; revoke it first, or choose another name")
    key = f"SG_{secrets.token_hex(16)}"  # the form that the API's own have
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    _save(path, [*keys, Key(name, digest_of(key), created)])
    return key


def revoke(path: Path, name: str) -> None:
    keys = load(path)
    if all(key.name != name for key in keys):
        raise unknown("key", name, [key.name for key in keys])
    _save(path, [key for key in keys if key.name != name])


def _save(path: Path, keys: list[Key]) -> None:
    text = json.dumps({"keys": [asdict(key) for key in keys]}, indent=1)
    try:
        with writing(path, permissions=0o600) as file:
            file.write(text.encode())
    except OSError as error:
        raise VegaEdgeError(f"{path} can't be written: {error.strerror}") from error


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
