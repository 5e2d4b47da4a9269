"""The exporter-toolkit's web configuration file: what is read, what is refused, what the server then does."""

from __future__ import annotations

import base64
import contextlib
import datetime
import http.client
import ipaddress
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import bcrypt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gpuglass.family import Tier
from gpuglass.server import MetricsServer, Reason, ServerLimits, WebConfigError, load_web_config
from gpuglass.server import reload as reload_module
from gpuglass.server.auth import BasicAuth, Verdict
from gpuglass.server.reload import TokenBucket, WebConfigSource
from gpuglass.server.tls import make_context, san_allowed
from gpuglass.server.web_config import TLSConfig, go_duration, parse_web_config
from gpuglass.store import Format

# Real certificates


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as PEM text."""

    cert: str
    key: str
    certificate: x509.Certificate
    private: ec.EllipticCurvePrivateKey

    def write(self, directory: Path, name: str) -> None:
        (directory / f"{name}.crt").write_text(self.cert)
        (directory / f"{name}.key").write_text(self.key)


def make_pair(name: str, issuer: Pair | None = None, sans: tuple[x509.GeneralName, ...] = ()) -> Pair:
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if sans:
        builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
    certificate = builder.sign(issuer.private if issuer else private, hashes.SHA256())
    return Pair(
        certificate.public_bytes(serialization.Encoding.PEM).decode(),
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ).decode(),
        certificate,
        private,
    )


LOCALHOST = (x509.IPAddress(ipaddress.ip_address("127.0.0.1")),)
CA = make_pair("authority")
OTHER_CA = make_pair("other authority")
SERVER = make_pair("server", CA, LOCALHOST)
RENEWED = make_pair("renewed", CA, LOCALHOST)
SCRAPER = make_pair("scraper", CA, (x509.DNSName("prometheus"), x509.RFC822Name("a@b.example")))
STRANGER = make_pair("stranger", OTHER_CA, (x509.DNSName("prometheus"),))

# Of "right" and "changed", at the least cost; constant, so that the names of tests are.
HASH = "$2b$04$XOZbbkCPlW99a9uxBw3FY.dlUnau2sgE7yUZAZzAd2FbaXj79dlzm"
NEW_HASH = "$2b$04$3Jo0VizjF.2iy4/Gnf5fCeSdHyAaHAVrKpNaJVHiebQGDQ4WCeQTa"
TLS = "tls_server_config: {cert_file: server.crt, key_file: server.key}\n"
MUTUAL = (
    "tls_server_config: {cert_file: server.crt, key_file: server.key, client_ca_file: ca.crt, "
    "client_auth_type: RequireAndVerifyClientCert%s}\n"
)
USERS = f"basic_auth_users:\n  alice: {HASH}\n"


class Body:
    """A store with a fixed body."""

    def exposition(self, tiers: frozenset[Tier], fmt: Format) -> bytes:
        return b"x 1\n"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with certificates; changes are looked for at each request instead of each second."""
    monkeypatch.setattr(reload_module, "CHECK_SECONDS", 0.0)
    SERVER.write(tmp_path, "server")
    SCRAPER.write(tmp_path, "scraper")
    STRANGER.write(tmp_path, "stranger")
    CA.write(tmp_path, "ca")
    return tmp_path


@pytest.fixture(autouse=True)
def quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Whatever a client does, nothing is written to stderr."""
    yield
    assert "Traceback" not in capfd.readouterr().err


@contextlib.contextmanager
def serving(directory: Path, text: str, **limits: float) -> Iterator[MetricsServer]:
    (directory / "web.yml").write_text(text)
    server = MetricsServer(
        Body(),
        listen="127.0.0.1:0",
        web_config=directory / "web.yml",
        limits=ServerLimits(**limits),  # type: ignore[arg-type]
    )
    server.start()
    try:
        yield server
    finally:
        server.stop(3.0)


def change(path: Path, text: str) -> None:
    """Replace a file as careful tools do; a new inode is noticed whatever the clock's resolution."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)


def tls_client(directory: Path, cert: str = "") -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(directory / "ca.crt"))
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    if cert:
        context.load_cert_chain(directory / f"{cert}.crt", directory / f"{cert}.key")
    return context


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def get(
    server: MetricsServer,
    path: str = "/metrics",
    context: ssl.SSLContext | None = None,
    authorization: str = "",
) -> tuple[int, http.client.HTTPMessage, bytes]:
    host, port = server.address.host, server.address.port
    connection: http.client.HTTPConnection = (
        http.client.HTTPSConnection(host, port, timeout=10, context=context)
        if context
        else http.client.HTTPConnection(host, port, timeout=10)
    )
    try:
        connection.request("GET", path, headers={"Authorization": authorization} if authorization else {})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def refused(server: MetricsServer, context: ssl.SSLContext) -> bool:
    """Whether a TLS client gets no answer (with TLS 1.3 it learns that only when it reads)."""
    try:
        get(server, context=context)
    except (OSError, http.client.HTTPException):
        return True
    return False


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


# Reading the file


def test_a_full_file_is_read(directory: Path) -> None:
    config = parse_web_config(
        f"""
tls_server_config:
  cert_file: server.crt
  key_file: server.key
  client_ca_file: ca.crt
  client_auth_type: RequireAndVerifyClientCert
  client_allowed_sans: [prometheus]
  min_version: TLS12
  max_version: TLS13
  cipher_suites: [TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, TLS_AES_128_GCM_SHA256]
  prefer_server_cipher_suites: false
  curve_preferences: [CurveP256]
http_server_config:
  http2: true
  headers:
    X-Frame-Options: deny
    X-XSS-Protection: ""
basic_auth_users:
  alice: {HASH}
rate_limit:
  interval: 1s
  burst: 20
""",
        directory / "web.yml",
    )
    assert config.tls and config.tls.client_allowed_sans == ("prometheus",)
    assert config.users == {"alice": HASH} and config.headers == (("X-Frame-Options", "deny"),)
    assert config.rate_limit and config.rate_limit.seconds == 1
    context = make_context(config.tls, directory / "web.yml")
    tls12 = {cipher["name"] for cipher in context.get_ciphers() if cipher["protocol"] != "TLSv1.3"}
    assert tls12 == {"ECDHE-ECDSA-AES128-GCM-SHA256"}
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert HASH not in repr(config) and HASH not in str(config)


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "tls_server_config:\nhttp_server_config: {}\n"])
def test_an_empty_file_asks_for_plain_http(text: str) -> None:
    config = parse_web_config(text, Path("web.yml"))
    assert config.tls is None and config.users == {}


T = "tls_server_config: {cert_file: a, key_file: b, "


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("tls_config: {}", "tls_config"),
        ("- a", "Expected"),
        ("a: [", "YAML"),
        ("basic_auth_users: {a: 1}", "basic_auth_users"),
        ("basic_auth_users: {a: secret}", r"basic_auth_users\.a: not a bcrypt hash"),
        (f"basic_auth_users: {{a: {HASH}, a: {HASH}}}", "'a' is given twice"),
        (f"basic_auth_users: {{'a:b': {HASH}}}", "basic_auth_users"),
        (f"basic_auth_users: {{a: {HASH.replace('$04$', '$31$')}}}", "at most 16"),
        ("http_server_config: {http2: maybe}", r"http_server_config\.http2"),
        ("http_server_config: {headers: {Server: x}}", r"headers\.Server: .* cannot be set"),
        ("http_server_config: {headers: {X-Frame-Options: allow}}", "deny, sameorigin"),
        ('http_server_config: {headers: {X-XSS-Protection: "1\\r\\nEvil: 1"}}', "one line"),
        ("rate_limit: {interval: soon, burst: 1}", r"rate_limit\.interval"),
        ("rate_limit: {interval: 1s}", r"rate_limit\.burst"),
        ("tls_server_config: {min_version: TLS12, key_file: b}", "cert_file: missing"),
        ("tls_server_config: {cert_file: a}", "key_file: missing"),
        (T + "cert: x}", "cert_file: cannot be given together"),
        (T + "surprise: 1}", "surprise"),
        (T + "min_version: TLS14}", "min_version"),
        (T + "max_version: TLS11}", "max_version"),
        (T + "min_version: TLS13, max_version: TLS12}", "min_version: TLS13 is above"),
        (T + "cipher_suites: [TLS_RSA_WITH_RC4_128_SHA]}", "TLS_RSA_WITH_RC4_128_SHA"),
        (T + "cipher_suites: TLS_AES_128_GCM_SHA256}", "cipher_suites"),
        (T + "curve_preferences: [P256]}", "unknown curve 'P256'"),
        (T + "client_auth_type: Maybe}", "client_auth_type"),
        (T + "client_auth_type: RequireAnyClientCert}", "RequireAnyClientCert is not supported"),
        (T + "client_auth_type: RequireAndVerifyClientCert}", "client_ca_file: missing"),
        (T + "client_ca_file: c}", "client_auth_type: NoClientCert does not use"),
        (T + "client_allowed_sans: [a]}", "client_allowed_sans: needs"),
        (
            T + "client_ca_file: c, client_auth_type: VerifyClientCertIfGiven, client_allowed_sans: [a]}",
            "client_allowed_sans: needs",
        ),
        (
            T + "client_ca_file: c, client_auth_type: RequireAndVerifyClientCert, client_allowed_sans: []}",
            "client_allowed_sans: an empty list",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(text: str, key: str) -> None:
    with pytest.raises(WebConfigError, match=rf"\A/etc/web\.yml: [^\n]*{key}[^\n]*\Z"):
        parse_web_config(text, Path("/etc/web.yml"))


def test_a_syntax_error_does_not_quote_the_file() -> None:
    with pytest.raises(WebConfigError) as raised:
        parse_web_config(f"basic_auth_users:\n  alice: {HASH}\n bob: [", Path("web.yml"))
    assert HASH not in str(raised.value) and "line" in str(raised.value)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0.0),
        ("0", 0.0),
        ("1s", 1.0),
        ("1m30s", 90.0),
        ("1.5h", 5400.0),
        ("250ms", 0.25),
        (2_000_000_000, 2.0),
    ],
)
def test_go_durations(value: str | int, seconds: float) -> None:
    assert go_duration(value) == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["", "1", "s", "1 s", "1d", "-1s", -1])
def test_what_is_no_go_duration(value: str | int) -> None:
    with pytest.raises(ValueError):
        go_duration(value)


def test_a_missing_file_and_a_directory_are_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.yml", tmp_path):
        with pytest.raises(WebConfigError, match=r"\A[^\n]*: cannot read: [^\n]*\Z"):
            load_web_config(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("server.crt", None, "cert_file server.crt: cannot read: no such file or directory"),
        ("server.crt", "junk", "cert_file server.crt: not a PEM certificate"),
        ("server.key", RENEWED.key, "key_file server.key: the key does not belong to the certificate"),
        ("server.key", "ENCRYPTED", "key_file server.key: the key is encrypted"),
        ("ca.crt", "junk", "client_ca_file: not PEM certificates"),
    ],
)
def test_bad_certificates_name_the_key_and_the_file(
    directory: Path, name: str, content: str | None, message: str
) -> None:
    if content == "ENCRYPTED":
        content = SERVER.private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        ).decode()
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_text(content)
    config = parse_web_config(MUTUAL % "", directory / "web.yml")
    assert config.tls
    with pytest.raises(WebConfigError, match=rf"tls_server_config\.{message}") as raised:
        make_context(config.tls, directory / "web.yml")
    assert "\n" not in str(raised.value)


def test_several_curves_are_refused_where_python_cannot_set_them(directory: Path) -> None:
    tls = TLSConfig(cert=SERVER.cert, key=SERVER.key, curve_preferences=("CurveP256", "CurveP384"))
    if hasattr(ssl.SSLContext, "set_groups"):
        make_context(tls, directory / "web.yml")
    else:
        with pytest.raises(WebConfigError, match="curve_preferences: more than one curve is not supported"):
            make_context(tls, directory / "web.yml")


def test_only_suites_of_tls13_mean_tls13_only(directory: Path) -> None:
    tls = TLSConfig(cert=SERVER.cert, key=SERVER.key, cipher_suites=("TLS_AES_128_GCM_SHA256",))
    assert make_context(tls, directory / "web.yml").minimum_version is ssl.TLSVersion.TLSv1_3


def test_names_of_certificates_are_compared_exactly() -> None:
    peer = {
        "subjectAltName": (("DNS", "a.example"), ("IP Address", "0:0:0:0:0:0:0:1"), ("URI", "spiffe://x/y"))
    }
    for name in ("a.example", "::1", "spiffe://x/y"):
        assert san_allowed(peer, (name,))
    for name in ("A.example", "example", "0:0:0:0:0:0:0:1", ""):
        assert not san_allowed(peer, (name,))
    assert not san_allowed(None, ("a",)) and not san_allowed({}, ("a",))


# TLS


def test_tls_serves_https_and_not_http(directory: Path) -> None:
    with serving(directory, TLS) as server:
        assert get(server, context=tls_client(directory))[0] == 200
        status, _, body = get(server)
        assert (status, body) == (400, b"this port speaks TLS only\n")
        assert refused(server, ssl.create_default_context())  # a client that does not know the authority
        assert eventually(lambda: server.stats().connections == 0)
        assert server.stats().rejected[Reason.TLS] == 2


def test_certificates_may_stand_in_the_file(directory: Path) -> None:
    indent = "\n".join(f"    {line}" for line in SERVER.cert.splitlines())
    key = "\n".join(f"    {line}" for line in SERVER.key.splitlines())
    with serving(directory, f"tls_server_config:\n  cert: |\n{indent}\n  key: |\n{key}\n") as server:
        assert get(server, context=tls_client(directory))[0] == 200


def test_tls_offers_http11_to_a_client_that_prefers_http2(directory: Path) -> None:
    with serving(directory, TLS) as server:
        context = tls_client(directory)
        context.set_alpn_protocols(["h2", "http/1.1"])
        with (
            socket.create_connection((server.address.host, server.address.port), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as sock,
        ):
            assert sock.selected_alpn_protocol() == "http/1.1"


def test_the_least_version_is_kept(directory: Path) -> None:
    with serving(directory, TLS.replace("}", ", min_version: TLS13}")) as server:
        old = tls_client(directory)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        assert refused(server, old)
        assert get(server, context=tls_client(directory))[0] == 200


def test_client_certificates_are_demanded_and_verified(directory: Path) -> None:
    with serving(directory, MUTUAL % "") as server:
        assert get(server, context=tls_client(directory, "scraper"))[0] == 200
        assert refused(server, tls_client(directory))
        assert refused(server, tls_client(directory, "stranger"))
        assert server.stats().requests == {("/metrics", 200): 1}


def test_a_client_certificate_is_verified_if_it_is_given(directory: Path) -> None:
    text = (MUTUAL % "").replace("RequireAndVerifyClientCert", "VerifyClientCertIfGiven")
    with serving(directory, text) as server:
        assert get(server, context=tls_client(directory, "scraper"))[0] == 200
        assert get(server, context=tls_client(directory))[0] == 200
        assert refused(server, tls_client(directory, "stranger"))


@pytest.mark.parametrize(
    ("allowed", "served"), [("prometheus", True), ("a@b.example", True), ("grafana", False)]
)
def test_only_allowed_names_are_let_in(directory: Path, allowed: str, served: bool) -> None:
    with serving(directory, MUTUAL % f", client_allowed_sans: ['{allowed}']") as server:
        assert refused(server, tls_client(directory, "scraper")) is not served
        assert server.stats().rejected[Reason.CERTIFICATE] == (not served)


def test_a_renewed_certificate_is_used_without_a_restart(directory: Path) -> None:
    def serial(server: MetricsServer) -> int:
        pem = ssl.get_server_certificate((server.address.host, server.address.port), timeout=5)
        return x509.load_pem_x509_certificate(pem.encode()).serial_number

    with serving(directory, TLS) as server:
        kept = http.client.HTTPSConnection(
            server.address.host, server.address.port, timeout=5, context=tls_client(directory)
        )
        kept.request("GET", "/metrics")
        assert kept.getresponse().read() == b"x 1\n"
        assert serial(server) == SERVER.certificate.serial_number
        change(directory / "server.crt", RENEWED.cert)  # the key is not there yet
        assert serial(server) == SERVER.certificate.serial_number
        assert not server.stats().web_config_ok and server.stats().reload_failures == 1
        change(directory / "server.key", RENEWED.key)
        assert serial(server) == RENEWED.certificate.serial_number
        stats = server.stats()
        assert (stats.web_config_ok, stats.reloads, stats.reload_failures) == (True, 1, 1)
        kept.request("GET", "/metrics")
        response = kept.getresponse()
        assert response.read() == b"x 1\n" and response.headers["Connection"] == "close"
        kept.close()


def test_a_kept_connection_ends_when_its_authority_is_no_longer_trusted(directory: Path) -> None:
    with serving(directory, MUTUAL % "") as server:
        kept = http.client.HTTPSConnection(
            server.address.host, server.address.port, timeout=5, context=tls_client(directory, "scraper")
        )
        kept.request("GET", "/metrics")
        assert kept.getresponse().read() == b"x 1\n"
        change(directory / "ca.crt", OTHER_CA.cert)
        kept.request("GET", "/metrics")
        with pytest.raises((OSError, http.client.HTTPException)):
            kept.getresponse()
        kept.close()


def test_a_handshake_that_stalls_hinders_nobody_and_is_cut(directory: Path) -> None:
    with (
        serving(directory, TLS, request_seconds=1.0) as server,
        socket.create_connection((server.address.host, server.address.port), timeout=10) as stalled,
    ):
        stalled.sendall(b"\x16\x03\x01")
        assert get(server, context=tls_client(directory))[0] == 200
        with contextlib.suppress(ConnectionError):
            assert stalled.recv(100) == b""
        assert server.stats().rejected[Reason.DEADLINE] == 1


def test_a_port_with_tls_is_stopped_with_a_stalled_client(directory: Path) -> None:
    with (
        serving(directory, TLS) as server,
        socket.create_connection((server.address.host, server.address.port), timeout=10) as stalled,
    ):
        stalled.sendall(b"\x16\x03\x01")
        assert eventually(lambda: server.stats().connections == 1)
        assert server.stop(2.0)


# Basic authentication


def test_only_the_right_password_is_let_in(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(directory, USERS) as server:
        for authorization in (
            "",
            basic("alice", "wrong"),
            basic("alice", ""),
            basic("bob", "right"),
            basic("", ""),
            "Basic !!!",
            "Basic",
            "Bearer " + base64.b64encode(b"alice:right").decode(),
            basic("alice", "right") + "x",
        ):
            status, headers, body = get(server, authorization=authorization)
            assert status == 401 and headers["WWW-Authenticate"].startswith("Basic ") and b"x 1" not in body
        assert get(server, authorization=basic("alice", "right"))[0] == 200
        assert get(server, authorization=basic("alice", "right").replace("Basic", "basic"))[0] == 200
        assert server.stats().rejected[Reason.UNAUTHORIZED] == 9
    assert "right" not in caplog.text and "wrong" not in caplog.text


def test_probes_need_no_password_and_all_else_does(directory: Path) -> None:
    with serving(directory, USERS) as server:
        statuses = {
            path: get(server, path)[0] for path in ("/healthz", "/readyz", "/", "/metrics/fast", "/x")
        }
    assert statuses == {"/healthz": 200, "/readyz": 200, "/": 401, "/metrics/fast": 401, "/x": 401}


def test_changed_users_count_at_once(directory: Path) -> None:
    with serving(directory, USERS) as server:
        assert get(server, authorization=basic("alice", "right"))[0] == 200
        change(directory / "web.yml", USERS.replace(HASH, NEW_HASH))
        assert get(server, authorization=basic("alice", "right"))[0] == 401
        assert get(server, authorization=basic("alice", "changed"))[0] == 200


@pytest.mark.parametrize(
    "broken",
    ["", "basic_auth_users:", "basic_auth_users: {}", "basic_auth_users: {a: b}", "{", None, TLS + USERS],
)
def test_no_broken_or_opened_file_lets_anybody_in(
    directory: Path, broken: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(directory, USERS) as server:
        if broken is None:
            (directory / "web.yml").unlink()
        else:
            change(directory / "web.yml", broken)
        for _ in range(3):
            assert get(server)[0] == 401
        assert get(server, authorization=basic("alice", "right"))[0] == 200
        stats = server.stats()
        assert (stats.web_config_ok, stats.reloads, stats.reload_failures) == (False, 0, 1)
        assert caplog.text.count("stays in force") == 1
        change(directory / "web.yml", USERS.replace(HASH, NEW_HASH))
        assert get(server, authorization=basic("alice", "changed"))[0] == 200
        assert server.stats().web_config_ok


@pytest.mark.parametrize(
    "weaker",
    [
        USERS,
        TLS,
        (MUTUAL % "").replace("RequireAndVerifyClientCert", "VerifyClientCertIfGiven"),
        MUTUAL % "",
    ],
)
def test_client_certificates_are_not_weakened_without_a_restart(directory: Path, weaker: str) -> None:
    with serving(directory, MUTUAL % ", client_allowed_sans: [prometheus]") as server:
        change(directory / "web.yml", weaker)
        assert refused(server, tls_client(directory))
        assert get(server, context=tls_client(directory, "scraper"))[0] == 200
        assert not server.stats().web_config_ok


def test_a_broken_file_at_the_start_is_an_error(directory: Path) -> None:
    with pytest.raises(WebConfigError), serving(directory, "basic_auth_users: {a: b}"):
        pass


def test_bcrypt_runs_once_for_each_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[bytes] = []
    real = bcrypt.checkpw

    def checkpw(password: bytes, hashed: bytes) -> bool:
        checked.append(hashed)
        return real(password, hashed)

    monkeypatch.setattr(bcrypt, "checkpw", checkpw)
    auth = BasicAuth({"alice": HASH}, threading.Semaphore(1))
    for _ in range(3):
        assert auth.check(basic("alice", "right"), 5) is Verdict.ACCEPTED
        assert auth.check(basic("alice", "wrong"), 5) is Verdict.REFUSED
        assert auth.check(basic("bob", "right"), 5) is Verdict.REFUSED
    assert len(checked) == 3
    assert checked[0] == checked[1] != checked[2]  # the unknown user's is checked, too, at the same cost
    assert checked[2].startswith(b"$2b$04$") and len(checked[2]) == len(HASH)


def test_an_unknown_user_is_refused_whatever_the_password_is_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bcrypt, "checkpw", lambda password, hashed: True)
    auth = BasicAuth({"alice": HASH}, threading.Semaphore(1))
    assert auth.check(basic("bob", "any"), 5) is Verdict.REFUSED
    assert auth.check(basic("alice", "any"), 5) is Verdict.ACCEPTED


def test_guesses_do_not_push_out_who_was_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    auth = BasicAuth({"alice": HASH}, threading.Semaphore(1))
    assert auth.check(basic("alice", "right"), 5) is Verdict.ACCEPTED
    monkeypatch.setattr(bcrypt, "checkpw", lambda password, hashed: False)
    for guess in range(300):
        assert auth.check(basic("alice", str(guess)), 5) is Verdict.REFUSED
    assert auth.check(basic("alice", "right"), 5) is Verdict.ACCEPTED
    assert len(auth._accepted) + len(auth._refused) <= 100


def test_a_password_waits_for_its_turn_only_so_long() -> None:
    work = threading.Semaphore(1)
    auth = BasicAuth({"alice": HASH}, work)
    assert auth.check(basic("alice", "right"), 5) is Verdict.ACCEPTED
    with work:
        assert auth.check(basic("alice", "wrong"), 0.05) is Verdict.BUSY
        assert auth.check(basic("alice", "right"), 0.05) is Verdict.ACCEPTED  # remembered
    assert auth.check(basic("alice", "wrong"), 5) is Verdict.REFUSED


@pytest.mark.parametrize("password", ["x" * 200, "a\0b", "pässwörd"])
def test_unusual_passwords_are_checked_like_others(password: str) -> None:
    try:
        hashed = bcrypt.hashpw(password.encode()[:72], bcrypt.gensalt(4)).decode()
    except ValueError:
        pytest.skip("this bcrypt takes no such password")
    auth = BasicAuth({"alice": hashed}, threading.Semaphore(1))
    assert auth.check(basic("alice", password), 5) is Verdict.ACCEPTED
    assert auth.check(basic("alice", "y" + password), 5) is Verdict.REFUSED


# Headers, rate limit, following the file


def test_headers_are_added_to_every_answer(directory: Path) -> None:
    with serving(
        directory, "http_server_config: {headers: {X-Content-Type-Options: nosniff}}\n" + USERS
    ) as server:
        for path in ("/metrics", "/healthz"):
            assert get(server, path)[1]["X-Content-Type-Options"] == "nosniff"
        assert get(server, "/healthz")[1]["X-Frame-Options"] is None


def test_the_rate_limit_spares_probes(directory: Path) -> None:
    with serving(directory, "rate_limit: {interval: 1h, burst: 2}\n") as server:
        assert [get(server)[0] for _ in range(3)] == [200, 200, 429]
        assert get(server, "/healthz")[0] == 200
        assert server.stats().rejected[Reason.RATE_LIMIT] == 1


def test_a_bucket_refills_with_time() -> None:
    now = [0.0]
    bucket = TokenBucket(2.0, 2, lambda: now[0])
    assert [bucket.take() for _ in range(3)] == [True, True, False]
    now[0] = 1.9
    assert not bucket.take()
    now[0] = 2.0
    assert bucket.take() and not bucket.take()
    now[0] = 1000.0
    assert [bucket.take() for _ in range(3)] == [True, True, False]


def test_files_are_looked_at_once_a_second_at_most(tmp_path: Path) -> None:
    now = [0.0]
    path = tmp_path / "web.yml"
    path.write_text(USERS)
    source = WebConfigSource(path, lambda: now[0])
    change(path, USERS.replace("alice", "bob"))
    now[0] = 0.9
    assert source.current().generation == 0
    now[0] = 1.0
    assert source.current().generation == 1
    now[0] = 3.0
    assert source.current().generation == 1  # nothing changed


def test_without_a_file_it_is_plain_http() -> None:
    in_force = WebConfigSource(None).current()
    assert in_force.context is None and in_force.auth is None
