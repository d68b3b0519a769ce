"""Who may call: API keys of which only hashes are kept, and headers that tell a browser to be careful.

A key is 256 random bits, so one round of SHA-256 protects it: there is nothing to guess by trying words, which is
what slow hashes are for. A file of keys holds a line for each, `NAME sha256:HASH`; to take a key away, its line is
removed and the server started again. Left out: what each key may do, quotas, and keys that expire.
"""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
LINE = re.compile(rf"({NAME.pattern})\s+sha256:([0-9a-f]{{64}})")
LOOPBACK = ("localhost", "127.0.0.1", "::1")

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
# The page of the documentation loads its program from where FastAPI says.
DOCS_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src https://cdn.jsdelivr.net; "
    "img-src data: https://fastapi.tiangolo.com; connect-src 'self'; frame-ancestors 'none'"
)


def new_key() -> str:
    """Return a key that nobody can guess."""
    return f"sk-{secrets.token_urlsafe(32)}"


def hash_of(key: str) -> str:
    """Return what is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return name -> hash from a file of keys. Raises ValueError that names a line which is none, OSError."""
    found: dict[str, str] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = LINE.fullmatch(line.strip())
        if match is None or match[1] in found:  # the line itself may hold a key, so it is not shown
            raise ValueError(f"{path}, line {number}: must be `NAME sha256:HASH`, each name once")
        found[match[1]] = match[2]
    if not found:
        raise ValueError(f"{path} must hold at least one key; `llm key {path} NAME` makes one")
    return found


def add_key(path: str | os.PathLike[str], name: str) -> str:
    """Write the hash of a new key to a file that only its owner can read, and return the key.

    Raises ValueError if the name cannot be used or is there already, or the file holds something else.
    """
    path = Path(path)
    if not NAME.fullmatch(name):
        raise ValueError(f"name must be 1 to 64 letters, digits and . _ -, got {name!r}")
    if path.exists() and path.stat().st_size and name in read_keys(path):
        raise ValueError(f"{path} has a key of the name {name} already")
    key = new_key()
    with os.fdopen(
        os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8"
    ) as file:
        file.write(f"{name} sha256:{hash_of(key)}\n")
    return key


class KeyRing:
    """The keys that a server takes.

    Args:
        hashes: name -> hash. None: everybody may call.
    """

    def __init__(self, hashes: Mapping[str, str] | None) -> None:
        self._hashes = None if hashes is None else {name: bytes.fromhex(h) for name, h in hashes.items()}

    @property
    def is_open(self) -> bool:
        """Whether everybody may call."""
        return self._hashes is None

    def owner(self, authorization: str) -> str | None:
        """Return the name of the key in a header `Authorization: Bearer KEY`; None if it is none of ours.

        The time that it takes says nothing about the keys: hashes are compared, all of them, in constant time.
        """
        scheme, _, key = authorization.partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        found = None
        for name, kept in (self._hashes or {}).items():
            if hmac.compare_digest(given, kept):
                found = name
        return found if scheme.lower() == "bearer" else None


def host_of(header: str) -> str:
    """Return the host in a header `Host`, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()
