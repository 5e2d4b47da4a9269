"""API keys and the tenants that they belong to, kept as salted hashes.

The file is JSON: `{"salt": "…", "keys": {"<hash>": "tenant", …}}`, where a hash is the HMAC-SHA256 of the key
with the salt, in hex. Keys themselves are stored nowhere. Use long random keys: a hash does not protect a
short one.

    python -m gpuglass_vllm.api_keys add keys.json acme     # reads the key from standard input
    python -m gpuglass_vllm.api_keys list keys.json
    python -m gpuglass_vllm.api_keys remove keys.json acme
"""

from __future__ import annotations

import argparse
import getpass
import hashlib
import hmac
import json
import logging
import os
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpuglass_vllm import records

logger = logging.getLogger("gpuglass_vllm")

_LOOK_EVERY = 5.0
"""Seconds between looks whether the file has changed."""


class KeyFileError(ValueError):
    """A key file that cannot be used; the message names what is wrong."""


def digest(salt: str, key: str) -> str:
    """Hash of a key as the file holds it."""
    return hmac.new(salt.encode(), key.encode(), hashlib.sha256).hexdigest()


def read(path: Path) -> tuple[str, dict[str, str]]:
    """Salt and tenants by hash. Raises `KeyFileError` or OSError."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise KeyFileError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("salt"), str) or not data["salt"]:
        raise KeyFileError(f'{path} has no "salt"')
    keys = data.get("keys")
    if not isinstance(keys, dict) or not all(isinstance(tenant, str) and tenant for tenant in keys.values()):
        raise KeyFileError(f'{path}: "keys" must be a map from hashes to names of tenants')
    return data["salt"], {name: tenant[: records.MAX_TENANT] for name, tenant in keys.items()}


class KeyFile:
    """Tenants by API key, from a file that may change while it is used. A broken new file changes nothing."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._salt = ""
        self._keys: dict[str, str] = {}
        self._read_at: tuple[int, int] | None = None
        self._next_look = 0.0

    def tenant(self, key: str) -> str | None:
        """Tenant of a key, or None."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + _LOOK_EVERY
            self._look()
        return self._keys.get(digest(self._salt, key)) if self._keys else None

    def _look(self) -> None:
        try:
            status = self._path.stat()
            version = (status.st_mtime_ns, status.st_ino)
            if version != self._read_at:
                self._read_at = version
                self._salt, self._keys = read(self._path)
        except (OSError, KeyFileError) as error:
            logger.warning("GPUGLASS_API_KEYS: %s; the keys read before stay in force", error)


def _write(path: Path, salt: str, keys: dict[str, str]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        json.dump({"salt": salt, "keys": keys}, file, indent=1)
        file.write("\n")
    os.replace(file.name, path)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gpuglass_vllm.api_keys",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("add", "adds a key, read from standard input, for a tenant"),
        ("list", "lists tenants and the beginnings of their hashes"),
        ("remove", "removes all keys of a tenant"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("file", type=Path)
        if name != "list":
            command.add_argument("tenant")
    options = parser.parse_args(arguments)
    try:
        salt, keys = read(options.file) if options.file.exists() else (secrets.token_hex(16), {})
        if options.command == "list":
            for name, tenant in sorted(keys.items(), key=lambda item: item[1]):
                print(f"{tenant}\t{name[:12]}…")
            return 0
        if options.command == "add":
            if not 0 < len(options.tenant) <= records.MAX_TENANT:
                raise KeyFileError(f"a tenant's name has 1 to {records.MAX_TENANT} characters")
            key = getpass.getpass("API key: ") if sys.stdin.isatty() else sys.stdin.readline().strip()
            if not key:
                raise KeyFileError("no key on standard input")
            keys[digest(salt, key)] = options.tenant
        else:
            kept = {name: tenant for name, tenant in keys.items() if tenant != options.tenant}
            if len(kept) == len(keys):
                raise KeyFileError(f"{options.file} has no key of {options.tenant}")
            keys = kept
        _write(options.file, salt, keys)
    except (OSError, KeyFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
