"""From the TLS section of the web configuration file to an `ssl.SSLContext` for the server's sockets.

Certificates and keys are read here, and only here; a failure is one `WebConfigError` that names file and key.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import ssl
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpuglass.server.tls_names import CIPHERS, CURVES
from gpuglass.server.web_config import ClientAuth, TLSConfig, TLSVersion, WebConfigError, read_text

_VERSIONS = {
    TLSVersion.TLS10: ssl.TLSVersion.TLSv1,
    TLSVersion.TLS11: ssl.TLSVersion.TLSv1_1,
    TLSVersion.TLS12: ssl.TLSVersion.TLSv1_2,
    TLSVersion.TLS13: ssl.TLSVersion.TLSv1_3,
}


def tls_files(tls: TLSConfig, directory: Path) -> list[Path]:
    """The files whose change demands a new context."""
    return [directory / name for name in (tls.cert_file, tls.key_file, tls.client_ca_file) if name]


def make_context(tls: TLSConfig, path: Path) -> ssl.SSLContext:
    """Build the context. `path` is the web configuration file. Raises `WebConfigError`."""
    where = f"{path}: tls_server_config"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    _set_versions(context, tls)
    if tls.prefer_server_cipher_suites:
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    else:
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    if names := [CIPHERS[name] for name in tls.cipher_suites if name in CIPHERS]:
        try:
            context.set_ciphers(":".join(names))
        except ssl.SSLError:
            raise WebConfigError(f"{where}.cipher_suites: this OpenSSL has none of them") from None
    _set_curves(context, tls.curve_preferences, f"{where}.curve_preferences")
    _load_certificate(context, tls, path.parent, where)
    if tls.client_auth_type.verifies:
        key = f"{where}.{'client_ca' if tls.client_ca else 'client_ca_file'}"
        authorities = tls.client_ca or read_text(
            path.parent / tls.client_ca_file, f"{key} {tls.client_ca_file}"
        )
        try:
            context.load_verify_locations(cadata=authorities)
        except (ssl.SSLError, ValueError):
            raise WebConfigError(f"{key}: not PEM certificates") from None
        required = tls.client_auth_type is ClientAuth.REQUIRE_AND_VERIFY
        context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    return context


def san_allowed(peer: Mapping[str, Any] | None, allowed: tuple[str, ...]) -> bool:
    """Whether a verified certificate, as `SSLSocket.getpeercert()` gives it, has an allowed name."""
    for kind, name in (peer or {}).get("subjectAltName", ()):
        if kind == "IP Address":
            with contextlib.suppress(ValueError):
                name = str(ipaddress.ip_address(name.strip()))
        if kind in ("DNS", "IP Address", "email", "URI") and name in allowed:
            return True
    return False


def _set_versions(context: ssl.SSLContext, tls: TLSConfig) -> None:
    minimum = _VERSIONS[tls.min_version]
    if tls.cipher_suites and not set(tls.cipher_suites) & set(CIPHERS):
        minimum = ssl.TLSVersion.TLSv1_3  # no suite of an older version is allowed
    with warnings.catch_warnings():
        # Python warns about TLS 1.0 and 1.1, whose use is the user's decision (and OpenSSL's security level).
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = minimum
        context.maximum_version = _VERSIONS[tls.max_version]


def _set_curves(context: ssl.SSLContext, names: tuple[str, ...], where: str) -> None:
    if not names:
        return
    curves = [CURVES[name] for name in names]
    try:
        if hasattr(context, "set_groups"):
            context.set_groups(":".join(curves))
        elif len(curves) == 1:
            context.set_ecdh_curve(curves[0])
        else:
            raise WebConfigError(f"{where}: more than one curve is not supported by this Python's ssl")
    except (ssl.SSLError, ValueError):
        raise WebConfigError(f"{where}: {', '.join(names)} is not supported by this Python's ssl") from None


def _load_certificate(context: ssl.SSLContext, tls: TLSConfig, directory: Path, where: str) -> None:
    cert_key = f"{where}.cert_file {tls.cert_file}" if tls.cert_file else f"{where}.cert"
    key_key = f"{where}.key_file {tls.key_file}" if tls.key_file else f"{where}.key"
    cert = read_text(directory / tls.cert_file, cert_key) if tls.cert_file else tls.cert
    key = read_text(directory / tls.key_file, key_key) if tls.key_file else tls.key

    def refuse_password() -> str:
        # Without this, OpenSSL would ask for the password on the terminal.
        raise WebConfigError(f"{key_key}: the key is encrypted, which is not supported")

    # Both are read above, once: what is checked is what is used, also while files are being replaced.
    with _memory_file(cert) as cert_path, _memory_file(key) as key_path:
        try:
            context.load_cert_chain(cert_path, key_path, refuse_password)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise WebConfigError(f"{key_key}: the key does not belong to the certificate") from None
            raise WebConfigError(
                f"{cert_key}: not a PEM certificate with its key ({error.reason or 'unreadable'})"
            ) from None


@contextlib.contextmanager
def _memory_file(content: str) -> Iterator[str]:
    """A path to `content`: `ssl` loads certificates from paths only, and keys do not belong on a disk."""
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "w", encoding="utf-8", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
