"""API keys: who may send requests, and as which tenant.

The file (a mounted Secret) has one key a line, hashed: `NAME:SHA256`, where SHA256 is `printf %s "$KEY" | sha256sum`.
Empty lines and lines that begin with `#` are skipped. Keys are long and random, so a plain digest is enough, and looking it
up tells nobody's key by its timing. A file that changes is read again; one that cannot be used leaves the old keys in place.

A client sends `Authorization: Bearer KEY` or `x-api-key: KEY`. Neither goes on to a worker. The key's NAME becomes the
request's tenant, whatever `x-tenant-id` says. /health needs no key.
"""

from __future__ import annotations

import logging
import re
from hashlib import sha256
from pathlib import Path

from kvfleet_router.io import wire
from kvfleet_router.io.connection import ClientConnection
from kvfleet_router.io.files import read_bounded
from kvfleet_router.io.request import Request
from kvfleet_router.io.server import Handler

log = logging.getLogger("kvfleet.router")

MAX_FILE_BYTES = 16 * 1_048_576
OPEN_PATHS = frozenset(("/health",))

_LINE = re.compile(r"([!-9;-~]{1,256}):([0-9a-fA-F]{64})")
_CREDENTIALS = {b"authorization", b"x-api-key"}


class KeysRejected(Exception):
    """The file holds no usable keys: says the line and the remedy."""


class ApiKeys:
    """The keys of one file. Raises KeysRejected when it cannot be used at first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names = _read(path)

    def reload(self) -> None:
        try:
            self._names = _read(self.path)
        except KeysRejected as error:
            log.error("API keys were not taken, the old ones stay: %s", error)

    def name_of(self, key: bytes) -> str | None:
        """Whose key it is; None: nobody's."""
        return self._names.get(sha256(key).digest())


class Authenticator:
    """A Handler that lets through who has a key."""

    def __init__(self, behind: Handler, keys: ApiKeys) -> None:
        self._behind = behind
        self._keys = keys

    def handle(self, request: Request, connection: ClientConnection) -> None:
        if request.path not in OPEN_PATHS:
            key = _key(request)
            name = self._keys.name_of(key) if key else None
            if name is None:
                connection.server.refuse("invalid_api_key")
                message = "Incorrect API key provided." if key else "No API key: send `Authorization: Bearer KEY`."
                body = wire.error_object(401, message, code="invalid_api_key")
                connection.reply(401, body, headers=[wire.header(b"www-authenticate", "Bearer")])
                return
            request.headers[b"x-tenant-id"] = name.encode()
            request.drop(_CREDENTIALS)
        self._behind.handle(request, connection)


def _key(request: Request) -> bytes:
    scheme, _, key = request.headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return key.strip()
    return request.headers.get(b"x-api-key", b"").strip()


def _read(path: Path) -> dict[bytes, str]:
    try:
        text = read_bounded(path, MAX_FILE_BYTES).decode()
    except OSError as error:
        raise KeysRejected(f"{path}: {error.strerror}: mount the Secret with the keys there") from error
    except ValueError as error:
        raise KeysRejected(f"{path}: {error}") from error
    names: dict[bytes, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        match = _LINE.fullmatch(entry)
        if match is None:
            raise KeysRejected(f'{path}, line {number}: not NAME:SHA256: hash a key by `printf %s "$KEY" | sha256sum`')
        names[bytes.fromhex(match[2])] = match[1]
    if not names:
        raise KeysRejected(f"{path}: holds no key: add a line NAME:SHA256")
    return names
