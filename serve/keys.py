"""API keys: a file of their hashes. A key is 128 random bits, so one SHA-256 of it is as good as any slower hash."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import UsageError, VegaEdgeError, unknown
from ..whole_file import writing

_log = logging.getLogger(__name__)
_LOOK_EVERY_S = 1.0


class Unreadable(VegaEdgeError):
    """The file is not there, or can't be read: nobody knows which keys are in it now."""


@dataclass(frozen=True)
class Key:
    """name: for people and logs. sha256: of the key. created: ISO 8601, UTC."""

    name: str
    sha256: str
    created: str


class KeyFile:
    """Read again when it has changed, so that a key that is revoked is refused a second later. A file that can't be
    read has no keys, and is tried again every second; one that is half written leaves those that were known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp, self._looked = _stamp(path), time.monotonic()  # before it is read: what changes meanwhile is seen
        self._keys = load(path)
        self._failure: str | None = None

    @property
    def failure(self) -> str | None:
        """Why the file as it is now is not the one that keys are compared with; None where it is."""
        self._refresh()
        return self._failure

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
        if stamp is not None and stamp == self._stamp:
            return
        try:
            self._keys, failure = load(self._path), None
        except Unreadable as error:
            self._keys, stamp, failure = [], None, f"{error}; no key is known now"
        except VegaEdgeError as error:  # such as one that is half written: it is read again when it changes
            failure = f"{error}; the keys that were in it stay"
        if failure and failure != self._failure:
            _log.error("%s", failure)
        self._stamp, self._failure = stamp, failure


def load(path: Path) -> list[Key]:
    """Unreadable for a file that is missing or can't be read, VegaEdgeError for one that is not of keys."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        return [_checked(Key(**entry)) for entry in written["keys"]]
    except FileNotFoundError:
        raise Unreadable(f"{path} does not exist; make it: vega-edge serve keys add NAME --api-keys {path}") from None
    except OSError as error:
        raise Unreadable(f"{path} can't be read: {error.strerror or error}") from error
    except RecursionError:
        raise VegaEdgeError(f"{path} is not a file of keys: it is nested too deep") from None
    except (ValueError, TypeError, KeyError) as error:
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
    path = path.resolve()  # a link stays one
    key = f"SG_{secrets.token_hex(16)}"  # the form that the API's own have
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with _alone(path):
        keys = load(path) if path.exists() else []
        if any(key.name == name for key in keys):
            raise UsageError(f"{path} has a key named {name!r}; revoke it first, or choose another name")
        _save(path, [*keys, Key(name, digest_of(key), created)])
    return key


def revoke(path: Path, name: str) -> None:
    path = path.resolve()
    with _alone(path):
        keys = load(path)
        if all(key.name != name for key in keys):
            raise unknown("key", name, [key.name for key in keys])
        _save(path, [key for key in keys if key.name != name])


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time: another would write back the keys that it read before, one that was revoked among them."""
    from filelock import FileLock

    if not path.parent.is_dir():  # which a lock would make; reading or writing `path` says it
        yield
        return
    lock = FileLock(path.with_name(f".{path.name}.lock"), mode=0o600)
    try:
        lock.acquire()
    except OSError as error:
        raise VegaEdgeError(f"{path} can't be written: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def _save(path: Path, keys: list[Key]) -> None:
    text = json.dumps({"keys": [asdict(key) for key in keys]}, indent=1)
    try:
        with writing(path, permissions=0o600) as file:
            file.write(text.encode())
            _keep_owner(file.fileno(), path)
    except OSError as error:
        raise VegaEdgeError(f"{path} can't be written: {error.strerror}") from error


def _keep_owner(file: int, path: Path) -> None:
    """Of the file that is replaced, so that a server still reads what its administrator has written."""
    if sys.platform == "win32" or not path.exists():
        return
    found = path.stat()
    with contextlib.suppress(PermissionError):  # only root may give files away
        os.fchown(file, found.st_uid, found.st_gid)
    os.fchmod(file, stat.S_IMODE(found.st_mode))


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
