"""API keys: a TOML file with a salted hash of each, and the look-up of what a client presents.

A key is 256 random bits, so one SHA-256 is all the hash that it needs: a slow one (scrypt, argon2) protects what people choose
and others can guess, and would cost every request what it costs an attacker.
"""

import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import tempfile
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from server.supervision.process import ServeError

LEAST_PRIORITY, MOST_PRIORITY = -100, 100
"""The range of priorities; a smaller one is served sooner."""
_HEADER = """\
# API keys of engineshed, as salted SHA-256. Written by `engineshed keys`, which keeps no comments.
# SIGHUP makes a running server read it again.
"""
_NAME = "[A-Za-z0-9._-]{1,64}"

log = logging.getLogger(__name__)


class KeysError(ServeError):
    """The keys' file cannot be read or written, or a change to it is impossible."""


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is kept of an API key."""

    name: Annotated[str, Meta(pattern=f"^{_NAME}$")]
    salt: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
    """16 random bytes in hexadecimal."""
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    """Of the salt's bytes and then the key's, in hexadecimal."""
    priority: Annotated[int, Meta(ge=LEAST_PRIORITY, le=MOST_PRIORITY)] = 0
    admin: bool = False
    """Whether `/admin` is open to it."""

    def matches(self, presented: bytes) -> bool:
        """Whether `presented` is this key, found out in a time that does not depend on how nearly it is."""
        return hmac.compare_digest(_hash(self.salt, presented), self.sha256)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    keys: tuple[Key, ...] = ()


class Keys:
    """The keys of a file, as a running server knows them. Raises KeysError if the file cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._keys = _read_for_serving(path)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, presented: str) -> Key | None:
        """The entry of the key that a client presents, or None; compares with every one whichever it is."""
        encoded = presented.encode("utf-8", "surrogateescape")  # which is how aiohttp decodes what is no UTF-8 in a header
        found = [key for key in self._keys if key.matches(encoded)]
        return found[0] if found else None

    def reload(self) -> bool:
        """Read the file again; a damaged one leaves the keys as they are, says why in the log, and gives False."""
        try:
            self._keys = _read_for_serving(self.path)
        except KeysError as error:
            log.error("%s; the %d keys read before stay valid", error, len(self))
            return False
        log.info("read %d keys from %s", len(self), self.path)
        return True


def new(name: str, *, priority: int = 0, admin: bool = False) -> tuple[Key, str]:
    """A new entry, and the key itself, which nothing else remembers. Raises KeysError for an impossible name or priority."""
    if not re.fullmatch(_NAME, name):
        raise KeysError(f"{name!r} cannot name a key; take 1 to 64 letters, digits, dots, hyphens and underscores")
    if not LEAST_PRIORITY <= priority <= MOST_PRIORITY:
        raise KeysError(f"the priority {priority} is not between {LEAST_PRIORITY} and {MOST_PRIORITY}")
    key, salt = f"es-{secrets.token_urlsafe(32)}", secrets.token_hex(16)
    return Key(name=name, salt=salt, sha256=_hash(salt, key.encode()), priority=priority, admin=admin), key


def read(path: Path) -> tuple[Key, ...]:
    """The entries in `path`. Raises KeysError, which names the entry and the field at fault."""
    text, _ = _content(path)
    return _parse(path, text)


def update(path: Path, change: Callable[[Sequence[Key]], Sequence[Key]]) -> None:
    """Replace the entries in `path` by what `change` makes of them; a file that is not there has none.

    The file is replaced whole, readable by its owner alone, while no other process does the same. Raises KeysError.
    """
    target = path.resolve()  # so that a link stays one
    with _alone(target.parent):
        _write(target, change(read(target) if target.exists() else ()))


def _hash(salt: str, key: bytes) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + key).hexdigest()


def _read_for_serving(path: Path) -> tuple[Key, ...]:
    text, mode = _content(path)
    keys = _parse(path, text)
    if mode & 0o077:
        log.warning("%s is open to others than its owner (mode %o); run: chmod 600 %s", path, mode, path)
    if not keys:
        log.warning("%s has no keys, so every request is refused; add one with: engineshed keys add NAME --file %s", path, path)
    return keys


def _content(path: Path) -> tuple[str, int]:
    """What is in the file, and its permissions."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(), stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    except FileNotFoundError:
        raise KeysError(f"there is no file {path}; make one with: engineshed keys add NAME --file {path}") from None
    except OSError as error:
        raise KeysError(f"the keys in {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise KeysError(f"{path} is no TOML: it is not UTF-8") from None


def _parse(path: Path, text: str) -> tuple[Key, ...]:
    try:
        keys = msgspec.convert(tomllib.loads(text), _File).keys
    except tomllib.TOMLDecodeError as error:
        raise KeysError(f"{path} is no TOML: {error}") from None
    except msgspec.ValidationError as error:
        raise KeysError(f"{path} is no file of API keys: {error}") from None
    twice = [name for name, count in Counter(key.name for key in keys).items() if count > 1]
    if twice:
        raise KeysError(f"{path} has several keys with the name {twice[0]!r}; remove all but one")
    return keys


def _write(target: Path, keys: Sequence[Key]) -> None:
    try:
        descriptor, draft = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")  # with mode 0600
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(_HEADER + "".join(map(_entry, keys)))
                if target.exists():
                    _give(descriptor, target)
                file.flush()
                os.fsync(descriptor)
            os.replace(draft, target)
        except BaseException:
            Path(draft).unlink()
            raise
    except OSError as error:
        raise KeysError(f"{target} cannot be written ({error.strerror})") from None


def _give(descriptor: int, target: Path) -> None:
    """Let the file belong to whom the one in its place belongs: root may edit the keys that another user serves with."""
    owner = target.stat()
    if (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def _entry(key: Key) -> str:
    """A key in TOML; no value has a character that would have to be escaped."""
    lines = ["", "[[keys]]", f'name = "{key.name}"', f'salt = "{key.salt}"', f'sha256 = "{key.sha256}"']
    if key.priority:
        lines.append(f"priority = {key.priority}")
    if key.admin:
        lines.append("admin = true")
    return "\n".join(lines) + "\n"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which outlives the file that is replaced in it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise KeysError(f"the folder {folder} cannot be opened ({error.strerror})") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
