"""What the reader sends, and what it makes of answers."""

from __future__ import annotations

import base64
import ssl
from pathlib import Path

import numpy as np
import pytest

from anomaly_sidecar.config import PrometheusConfig
from anomaly_sidecar.reader import Reader, ReadError, labels_of
from tests.anomaly_sidecar.fake_server import FakeServer, Series, running
from tests.gpuglass.test_web_config import LOCALHOST, make_pair

AT = 1_700_006_400.0


def world(query: str, at: float) -> Series:
    return {(("__name__", "m"), ("pod", "a")): at - AT, (("pod", "b"),): 0.5}


def test_an_instant_vector() -> None:
    with running(FakeServer(world)) as server:
        found = Reader(PrometheusConfig(url=server.url)).instant("m", AT + 7)
    assert [labels_of(key) for key in found.keys] == [(("metric", "m"), ("pod", "a")), (("pod", "b"),)]
    assert found.values.tolist() == [7.0, 0.5]
    path, form, _ = server.requests[0]
    assert path == "/api/v1/query"
    assert form == {"query": "m", "time": "1700006407"}


def test_a_prefix_is_kept() -> None:
    with running(FakeServer(world)) as server:
        Reader(PrometheusConfig(url=f"{server.url}/prometheus/")).instant("m", AT)
    assert server.requests[0][0] == "/prometheus/api/v1/query"


def test_a_long_range_comes_in_pieces_within_the_limits() -> None:
    with running(FakeServer(world)) as server:
        reader = Reader(PrometheusConfig(url=server.url, max_points=100, max_samples=60))
        pieces = list(reader.history("m", AT, AT + 6000, 60.0, series=2))
    assert [len(piece.times) for piece in pieces] == [30, 30, 30, 11]
    assert np.concatenate([piece.times for piece in pieces]).tolist() == [AT + 60 * n for n in range(101)]
    assert np.concatenate([piece.values[:, 0] for piece in pieces]).tolist() == [60.0 * n for n in range(101)]


def test_an_end_between_two_steps_adds_no_step() -> None:
    with running(FakeServer(world)) as server:
        reader = Reader(PrometheusConfig(url=server.url))
        (piece,) = reader.history("m", AT, AT + 299, 60.0, series=2)
    assert piece.times[-1] == AT + 240
    assert np.isfinite(piece.values).all()


def test_gaps_in_a_range_are_gaps() -> None:
    def holes(query: str, at: float) -> Series:
        return {} if at in (AT + 60, AT + 120) else world(query, at)

    with running(FakeServer(holes)) as server:
        found = Reader(PrometheusConfig(url=server.url)).range("m", AT, AT + 240, 60.0)
    assert np.isnan(found.values[:, 0]).tolist() == [False, True, True, False, False]


def test_credentials_come_from_files_and_are_read_each_time(tmp_path: Path) -> None:
    token, tenant = tmp_path / "token", tmp_path / "tenant"
    token.write_text("first\n")
    tenant.write_text("team-a")
    with running(FakeServer(world)) as server:
        reader = Reader(
            PrometheusConfig(
                url=server.url,
                bearer_token_file=str(token),
                headers={"X-Custom": "1"},
                header_files={"X-Scope-OrgID": str(tenant)},
            )
        )
        reader.instant("m", AT)
        token.write_text("second")
        reader.instant("m", AT)
        token.unlink()
        with pytest.raises(ReadError, match="token: No such file"):
            reader.instant("m", AT)
    headers = [request[2] for request in server.requests]
    assert [own["authorization"] for own in headers] == ["Bearer first", "Bearer second"]
    assert headers[0]["x-scope-orgid"] == "team-a"
    assert headers[0]["x-custom"] == "1"


def test_basic_authentication(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("säkret")
    with running(FakeServer(world)) as server:
        config = PrometheusConfig(url=server.url, username="u", password_file=str(tmp_path / "password"))
        Reader(config).instant("m", AT)
    scheme, _, pair = server.requests[0][2]["authorization"].partition(" ")
    assert (scheme, base64.b64decode(pair).decode()) == ("Basic", "u:säkret")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("html", "a page instead of JSON"),
        ("429", "status 429: fault 429"),
        ("500", "status 500"),
        ("422", "status 422: fault 422"),
        ("half", "ends in the middle"),
        ("cut", "broken or cut-off JSON"),
        ("empty", "broken or cut-off JSON"),
        ("nonsense", "cannot be read"),
    ],
)
def test_what_is_no_answer_is_one_line(fault: str, said: str) -> None:
    with running(FakeServer(world, fault=fault)) as server:
        reader = Reader(PrometheusConfig(url=server.url))
        with pytest.raises(ReadError, match=said) as error:
            reader.instant("m", AT)
        if fault != "nonsense":
            with pytest.raises(ReadError, match=said):
                reader.range("m", AT, AT + 600, 60.0)
    assert "\n" not in str(error.value)
    assert error.value.retry_after == (1.0 if fault == "429" else 0.0)


def test_nobody_there_is_one_line() -> None:
    with pytest.raises(ReadError, match="cannot connect: Connection refused"):
        Reader(PrometheusConfig(url="http://127.0.0.1:1")).now()


def test_a_plain_server_is_no_tls_server() -> None:
    with running(FakeServer(world)) as server, pytest.raises(ReadError):
        Reader(PrometheusConfig(url=server.url.replace("http:", "https:"))).now()


def test_certificates_are_verified_and_the_readers_own_is_shown(tmp_path: Path) -> None:
    authority = make_pair("authority")
    for name in ("server", "client"):
        make_pair(name, authority, LOCALHOST).write(tmp_path, name)
    authority.write(tmp_path, "authority")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    context.load_verify_locations(tmp_path / "authority.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    ca, cert, key = (str(tmp_path / name) for name in ("authority.crt", "client.crt", "client.key"))
    with running(FakeServer(world), context) as server:
        both = PrometheusConfig(url=server.url, ca_file=ca, cert_file=cert, key_file=key)
        assert Reader(both).instant("m", AT + 1).values[0] == 1
        with pytest.raises(ReadError):
            Reader(PrometheusConfig(url=server.url, ca_file=ca)).now()
        with pytest.raises(ReadError, match="not trusted"):
            Reader(PrometheusConfig(url=server.url)).now()
        with pytest.raises(ReadError, match="No such file"):
            Reader(PrometheusConfig(url=server.url, ca_file=str(tmp_path / "none.pem"))).now()
        (tmp_path / "broken.pem").write_text("no certificate")
        with pytest.raises(ReadError, match="no PEM file"):
            Reader(PrometheusConfig(url=server.url, ca_file=str(tmp_path / "broken.pem"))).now()
