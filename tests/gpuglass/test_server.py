"""The HTTP server over real sockets: what a scraper gets, and what a broken or hostile client costs."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.samples import Exemplar

from gpuglass.family import Batch, Family, Histogram, Kind, Tier
from gpuglass.server import ListenError, MetricsServer, Reason, ServerLimits, parse_listen
from gpuglass.server.request import BadRequest, gzip_accepted, take_head
from gpuglass.server.stats import HANDLERS
from gpuglass.store import Format, Store

PROMETHEUS_2_42 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
# https://prometheus.io/docs/instrumenting/content_negotiation/#default-accept-header
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,"
    "text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)

FAST = Family("gpuglass_power_watts", Kind.GAUGE, "Power.", ("gpu",), "watts", Tier.FAST)
STEPS = Family(
    "gpuglass_step_seconds", Kind.HISTOGRAM, "Steps.", (), "seconds", Tier.FAST, buckets=(0.1, 1.0)
)
SLOW = Family("gpuglass_restarts_total", Kind.COUNTER, "Restarts.", ("gpu",), tier=Tier.SLOW)


def example_store() -> Store:
    store = Store([FAST, STEPS, SLOW])
    batch = Batch()
    batch.add(FAST, 250.0, "0")
    batch.add(SLOW, 3.0, "0")
    batch.add_histogram(STEPS, Histogram((1, 2, 0), 1.5, {1: Exemplar({"trace_id": "ab"}, 0.7)}))
    store.publish("test", batch)
    return store


class Rendering:
    """A store whose body and duration the test decides."""

    def __init__(self, body: bytes = b"", wait: Callable[[], object] = lambda: None) -> None:
        self.body = body
        self.wait = wait

    def exposition(self, tiers: frozenset[Tier], fmt: Format) -> bytes:
        self.wait()
        return self.body


@contextlib.contextmanager
def serving(store: object = None, listen: str = "127.0.0.1:0", **settings: object) -> Iterator[MetricsServer]:
    server = MetricsServer(store or example_store(), listen=listen, **settings)  # type: ignore[arg-type]
    server.start()
    try:
        yield server
    finally:
        server.stop(3.0)


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def shared() -> Iterator[MetricsServer]:
    with serving(limits=ServerLimits(request_seconds=2.0)) as running:
        yield running


@pytest.fixture(autouse=True)
def quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Whatever a client does, nothing is written to stderr."""
    yield
    assert "Traceback" not in capfd.readouterr().err


def client(server: MetricsServer, timeout: float = 10.0) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(server.address.host, server.address.port, timeout=timeout)


def get(
    server: MetricsServer, path: str, method: str = "GET", **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = client(server)
    try:
        connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def connect(server: MetricsServer) -> socket.socket:
    return socket.create_connection((server.address.host, server.address.port), timeout=10)


def rest(sock: socket.socket) -> bytes:
    """All bytes until the server closes; a reset counts as the end."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while chunk := sock.recv(65536):
            received += chunk
    return received


def raw(server: MetricsServer, request: bytes) -> bytes:
    with connect(server) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        return rest(sock)
    return b""


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def still_serves(server: MetricsServer) -> bool:
    response, body = get(server, "/metrics/fast")
    return response.status == 200 and b"gpuglass_power_watts" in body


# What a scraper gets


def test_the_tiers_are_disjoint_and_the_union_is_both(server: MetricsServer) -> None:
    fast, slow, both = (
        set(get(server, path)[1].splitlines()) for path in ("/metrics/fast", "/metrics/slow", "/metrics")
    )
    assert fast and slow and not fast & slow
    assert fast | slow == both


@pytest.mark.parametrize("accept", [PROMETHEUS_2_42, PROMETHEUS_3])
def test_prometheus_gets_openmetrics_with_exemplars_and_an_end(server: MetricsServer, accept: str) -> None:
    response, body = get(server, "/metrics", Accept=accept)
    assert response.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n") and body.count(b"# EOF") == 1
    families = {family.name: family for family in parse_openmetrics(body.decode())}
    exemplars = [sample.exemplar for sample in families["gpuglass_step_seconds"].samples if sample.exemplar]
    assert [(exemplar.labels, exemplar.value) for exemplar in exemplars] == [({"trace_id": "ab"}, 0.7)]


@pytest.mark.parametrize("accept", ["", "*/*", "text/plain;version=0.0.4", "nonsense;;=,;q=x"])
def test_others_get_the_classic_text_without_an_end(server: MetricsServer, accept: str) -> None:
    response, body = get(server, "/metrics", Accept=accept)
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert b"# EOF" not in body and b"trace_id" not in body
    assert len(list(parse_text(body.decode()))) == 3


def test_gzip_is_used_when_it_is_accepted_and_only_then(server: MetricsServer) -> None:
    plain, plain_body = get(server, "/metrics/slow", Accept_Encoding="gzip;q=0, identity")
    packed, packed_body = get(server, "/metrics/slow", Accept_Encoding="gzip")
    assert plain.headers["Content-Encoding"] is None
    assert packed.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed_body) == plain_body
    assert plain.headers["Vary"] == packed.headers["Vary"] == "Accept, Accept-Encoding"
    assert int(packed.headers["Content-Length"]) == len(packed_body)


@pytest.mark.parametrize(
    ("field", "accepted"),
    [
        ("gzip", True),
        ("deflate, GZIP;q=0.5", True),
        ("x-gzip", True),
        ("*", True),
        ("gzip;q=0.001", True),
        ("", False),
        ("identity", False),
        ("gzip;q=0", False),
        ("gzip; q=0.000", False),
        ("*, gzip;q=0", False),
        ("*;q=0", False),
        ("gzip;q=junk", False),
        ("gzipped", False),
    ],
)
def test_weights_of_codings_are_read(field: str, accepted: bool) -> None:
    assert gzip_accepted(field) is accepted


def test_head_has_the_fields_of_get_and_no_body(server: MetricsServer) -> None:
    got, body = get(server, "/metrics/slow")
    head, nothing = get(server, "/metrics/slow", method="HEAD")
    assert nothing == b"" and head.headers["Content-Length"] == got.headers["Content-Length"] == str(
        len(body)
    )


def test_the_landing_page_links_the_paths_and_names_the_version() -> None:
    with serving(title="GPUGlass <agent>", version="1.2.3") as server:
        response, body = get(server, "/")
    assert response.status == 200 and response.headers["Content-Type"].startswith("text/html")
    assert b"GPUGlass &lt;agent&gt; 1.2.3" in body and b'href="/metrics/fast"' in body
    assert response.headers["Server"] == "gpuglass"


def test_health_and_readiness_differ() -> None:
    reasons: list[str | None] = ["no GPU\nfound"]
    with serving(readiness=lambda: reasons[0]) as server:
        assert get(server, "/healthz")[1] == b"ok\n"
        response, body = get(server, "/readyz")
        assert (response.status, body) == (503, b"no GPU found\n")
        reasons[0] = None
        response, body = get(server, "/readyz")
        assert (response.status, body) == (200, b"ok\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_other_methods_are_refused_with_those_allowed(shared: MetricsServer, method: str) -> None:
    response, _ = get(shared, "/metrics", method=method)
    assert response.status == 405 and response.headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "path",
    ["/metrics/", "/metrics/fast/../slow", "/../etc/passwd", "/metrics%2Ffast", "//metrics", "/Metrics"],
)
def test_unknown_paths_are_not_found(shared: MetricsServer, path: str) -> None:
    assert get(shared, path)[0].status == 404


@pytest.mark.parametrize("target", ["/metrics?name[]=x", "http://h/metrics", "HTTP://h:1/metrics?x"])
def test_a_query_and_an_absolute_address_are_understood(shared: MetricsServer, target: str) -> None:
    answer = raw(shared, f"GET {target} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 200") and b"gpuglass_power_watts" in answer


def test_a_connection_is_kept_for_further_scrapes(server: MetricsServer) -> None:
    connection = client(server)
    for _ in range(5):
        connection.request("GET", "/metrics/fast")
        response = connection.getresponse()
        assert response.status == 200 and response.read()
        sock = connection.sock
        assert sock is not None
    assert server.stats().connections == 1
    connection.close()


def test_a_connection_is_closed_when_the_client_asks_for_it(server: MetricsServer) -> None:
    with connect(server) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        assert b"Connection: close" in rest(sock)
    with connect(server) as sock:
        sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert rest(sock).endswith(b"ok\n")


def test_pipelined_requests_are_answered_in_order(server: MetricsServer) -> None:
    two = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\nGET /nothing HTTP/1.1\r\nHost: h\r\n\r\n"
    answers = re.findall(rb"HTTP/1.1 (\d+)", raw(server, two))
    assert answers == [b"200", b"404"]


def test_two_scrapers_are_served_at_once() -> None:
    both = threading.Barrier(2, timeout=10)
    with serving(Rendering(b"x 1\n", both.wait)) as server:
        statuses: list[int] = []
        threads = [
            threading.Thread(target=lambda: statuses.append(get(server, "/metrics")[0].status)) for _ in "ab"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert statuses == [200, 200]  # each rendering waited for the other


def test_a_failing_store_is_a_500_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    failing = [True]

    def fail() -> None:
        if failing[0]:
            raise RuntimeError("secret detail")

    with serving(Rendering(b"x 1\n", fail)) as server:
        response, body = get(server, "/metrics")
        assert response.status == 500 and b"secret" not in body
        assert server.stats().rejected[Reason.ERROR] == 1 and "could not be rendered" in caplog.text
        failing[0] = False
        assert get(server, "/metrics")[0].status == 200


# What the server says about itself


def test_the_statistics_count_what_happened(server: MetricsServer) -> None:
    _, body = get(server, "/metrics/fast")
    get(server, "/nothing/at/all")
    get(server, "/another/unknown/path")
    assert eventually(lambda: server.stats().connections == 0)
    stats = server.stats()
    assert stats.requests == {("/metrics/fast", 200): 1, ("other", 404): 2}
    assert stats.renderings["/metrics/fast"].count == 1 and stats.renderings["/metrics/fast"].seconds > 0
    assert stats.sent_bytes == len(body) + 2 * len(b"not found\n")
    assert set(stats.rejected) == set(Reason) and not any(stats.rejected.values())
    assert stats.scrapes == 0 and stats.web_config_ok


# Bounds


def test_a_scraper_that_does_not_read_is_cut_while_others_are_served() -> None:
    limits = ServerLimits(request_seconds=1.0, scrapes=2)
    with serving(Rendering(b"# x\n" * 8_000_000), limits=limits) as server, connect(server) as slow:
        slow.sendall(b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n")
        assert eventually(lambda: server.stats().scrapes == 1)
        assert get(server, "/metrics", method="HEAD")[0].status == 200
        assert eventually(lambda: server.stats().scrapes == 0)
        assert server.stats().rejected[Reason.DEADLINE] == 1
        assert len(rest(slow)) < 32_000_000


def test_a_header_that_drips_in_is_cut_at_the_deadline() -> None:
    with serving(limits=ServerLimits(request_seconds=0.8)) as server, connect(server) as slow:
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            slow.sendall(b"GET /metrics HTTP/1.1\r\n")
            while time.monotonic() - started < 40:
                slow.sendall(b"X")
                if select.select([slow], [], [], 0.05)[0]:
                    break
        assert 0.5 < time.monotonic() - started < 30
        assert rest(slow) == b""
        assert server.stats().rejected[Reason.DEADLINE] == 1
        assert still_serves(server)


def test_an_idle_connection_outlives_the_request_deadline_but_not_its_own() -> None:
    limits = ServerLimits(request_seconds=0.5, idle_seconds=5.0)
    with serving(limits=limits) as server:
        kept = client(server)
        kept.request("GET", "/healthz")
        kept.getresponse().read()
        time.sleep(1.2)
        kept.request("GET", "/healthz")
        assert kept.getresponse().read() == b"ok\n"
        assert server.stats().connections == 1
        assert eventually(lambda: server.stats().connections == 0)
        assert server.stats().rejected[Reason.DEADLINE] == 0
        kept.close()


def test_a_connection_without_a_first_byte_does_not_stay() -> None:
    with serving(limits=ServerLimits(request_seconds=0.5)) as server, connect(server) as silent:
        assert rest(silent) == b""


def test_a_flood_of_connections_is_turned_away_and_counted() -> None:
    with serving(limits=ServerLimits(connections=4)) as server, contextlib.ExitStack() as stack:
        kept = [stack.enter_context(connect(server)) for _ in range(4)]
        assert eventually(lambda: server.stats().connections == 4)
        for _ in range(3):
            with connect(server) as refused:
                assert rest(refused).startswith(b"HTTP/1.1 503")
        assert server.stats().rejected[Reason.CONNECTIONS] == 3
        kept[0].close()
        assert eventually(lambda: server.stats().connections == 3)
        assert still_serves(server)


def test_scrapes_beyond_the_limit_are_told_to_come_again() -> None:
    release = threading.Event()
    with serving(Rendering(b"x 1\n", lambda: release.wait(10)), limits=ServerLimits(scrapes=2)) as server:
        threads = [threading.Thread(target=get, args=(server, "/metrics")) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert eventually(lambda: server.stats().scrapes == 2)
        response, _ = get(server, "/metrics")
        assert response.status == 503 and response.headers["Retry-After"] == "1"
        assert get(server, "/healthz")[0].status == 200
        release.set()
        for thread in threads:
            thread.join(10)
        assert get(server, "/metrics")[0].status == 200
        assert server.stats().rejected[Reason.SCRAPES] == 1


def test_the_scrapers_own_timeout_is_kept() -> None:
    with serving(Rendering(b"x 1\n", lambda: time.sleep(0.7))) as server:
        with connect(server) as sock:
            sock.sendall(
                b"GET /metrics HTTP/1.1\r\nHost: h\r\nX-Prometheus-Scrape-Timeout-Seconds: 0.3\r\n\r\n"
            )
            answer = rest(sock)  # cut, or 503 if the rendering ends before the cut
        assert b" 200 " not in answer and b"x 1" not in answer
        assert eventually(lambda: server.stats().requests.get(("/metrics", 503)) == 1)
        stats = server.stats()
        assert stats.rejected[Reason.DEADLINE] + stats.rejected[Reason.LATE] == 1
        response, body = get(server, "/metrics", X_Prometheus_Scrape_Timeout_Seconds="5")
        assert (response.status, body) == (200, b"x 1\n")


@pytest.mark.parametrize("junk", ["", "abc", "-1", "0", "nan", "inf", "1e999", "1_0"])
def test_a_scrape_timeout_that_is_none_is_ignored(shared: MetricsServer, junk: str) -> None:
    assert get(shared, "/metrics", X_Prometheus_Scrape_Timeout_Seconds=junk)[0].status == 200


def test_a_scrape_timeout_never_lengthens_the_deadline() -> None:
    release = threading.Event()
    limits = ServerLimits(request_seconds=0.5)
    with serving(Rendering(b"x 1\n", lambda: release.wait(10)), limits=limits) as server:
        with connect(server) as sock:
            sock.sendall(
                b"GET /metrics HTTP/1.1\r\nHost: h\r\nX-Prometheus-Scrape-Timeout-Seconds: 60\r\n\r\n"
            )
            started = time.monotonic()
            assert rest(sock) == b""
            assert time.monotonic() - started < 9, "the rendering was waited for"
        release.set()


HOST = b"Host: h\r\n"
BAD = [
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, Reason.TLS),
    (b"\x00\x00\x00\x00", 400, Reason.MALFORMED),
    (b"GET /metrics\r\n\r\n", 400, Reason.MALFORMED),  # HTTP/0.9
    (b"GET /metrics HTTP/1.1\n\n", 400, Reason.MALFORMED),
    (b"GET /metrics HTTP/1.1\r\n\r\n", 400, Reason.MALFORMED),  # no Host
    (b"GET /met\x00rics HTTP/1.1\r\n" + HOST + b"\r\n", 400, Reason.MALFORMED),
    (b"GET /metrics HTTP/1.1\r\nHost: h\x00\r\n\r\n", 400, Reason.MALFORMED),
    (b"GET /metrics HTTP/1.1\r\nHost : h\r\n\r\n", 400, Reason.MALFORMED),
    (b"GET /metrics HTTP/1.1\r\n" + HOST + b" folded: x\r\n\r\n", 400, Reason.MALFORMED),
    (b"GET /metrics HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400, Reason.MALFORMED),
    (b"GET /metrics HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n", 400, Reason.MALFORMED),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, Reason.MALFORMED),
    (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414, Reason.TOO_LARGE),
    (b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", 431, Reason.TOO_LARGE),
    (b"GET / HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 100 + b"\r\n", 431, Reason.TOO_LARGE),
    (b"GET / HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\nabc", 413, Reason.BODY),
    (b"GET / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 413, Reason.BODY),
    (b"GET /metrics HTTP/1.1\r\nHo", 0, Reason.INCOMPLETE),
]


@pytest.mark.parametrize(("request_bytes", "status", "reason"), BAD)
def test_what_is_no_request_is_refused_counted_and_forgotten(
    server: MetricsServer, request_bytes: bytes, status: int, reason: Reason
) -> None:
    answer = raw(server, request_bytes)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()) if status else answer == b""
    assert eventually(lambda: server.stats().connections == 0)
    assert {key: count for key, count in server.stats().rejected.items() if count} == {reason: 1}
    assert still_serves(server)


def test_a_post_with_a_body_reads_its_refusal(server: MetricsServer) -> None:
    response, _ = get(server, "/metrics", method="POST", Content_Length="0")
    assert response.status == 405
    connection = client(server)
    connection.request("POST", "/metrics", body=b"x" * 20_000)
    response = connection.getresponse()
    assert response.status == 405 and response.headers["Connection"] == "close"
    connection.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    junk=st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=60).map(lambda b: b"GET " + b + b" HTTP/1.1\r\nHost: h\r\n\r\n"),
        st.binary(max_size=60).map(lambda b: b"GET / HTTP/1.1\r\nHost: h\r\n" + b + b"\r\n\r\n"),
    )
)
def test_garbage_never_stops_the_server(shared: MetricsServer, junk: bytes) -> None:
    raw(shared, junk)
    assert still_serves(shared)
    stats = shared.stats()
    assert {handler for handler, _ in stats.requests} <= set(HANDLERS)
    assert stats.rejected[Reason.ERROR] == 0


@settings(max_examples=300, deadline=None)
@given(
    data=st.one_of(
        st.binary(max_size=400),
        st.lists(
            st.sampled_from(
                [
                    b"GET ",
                    b"/",
                    b" HTTP/1.1",
                    b"\r\n",
                    b"\r",
                    b"\n",
                    b"Host: h",
                    b"A:",
                    b" ",
                    b"\0",
                    b"x" * 90,
                ]
            ),
            max_size=14,
        ).map(b"".join),
    ),
    cut=st.integers(0, 400),
)
def test_the_reader_of_heads_only_ever_refuses(data: bytes, cut: int) -> None:
    """The same bytes in one piece or two give the same outcome, and never another exception."""

    def outcome(*pieces: bytes) -> object:
        buffer = bytearray()
        try:
            for piece in pieces:
                buffer += piece
                if (head := take_head(buffer, 256, 8)) is not None:
                    return head
        except BadRequest as error:
            return error.reason
        return None

    assert outcome(data) == outcome(data[:cut], data[cut:])


# Addresses, start and stop


@pytest.mark.parametrize(
    ("listen", "host", "port"),
    [
        ("127.0.0.1:9835", "127.0.0.1", 9835),
        ("[::1]:0", "::1", 0),
        (":9100", "", 9100),
        ("h-1.a:1", "h-1.a", 1),
    ],
)
def test_listen_addresses_are_read(listen: str, host: str, port: int) -> None:
    address = parse_listen(listen)
    assert (address.host, address.port, str(address)) == (host, port, listen)


@pytest.mark.parametrize(
    "listen", ["", "9835", "h", "h:", "h:x", "::1:80", "[::1]", "h:70000", "a b:1", "h:-1"]
)
def test_what_is_no_address_is_one_line_that_names_the_setting(listen: str) -> None:
    with pytest.raises(ListenError, match=r"\Alisten: [^\n]+\Z"):
        MetricsServer(example_store(), listen=listen)


def test_a_busy_port_is_one_line_with_the_mend(server: MetricsServer) -> None:
    second = MetricsServer(example_store(), listen=str(server.address))
    with pytest.raises(ListenError) as raised:
        second.start()
    assert str(raised.value) == (
        f"listen: cannot bind {server.address}: address already in use; choose another with listen: HOST:PORT"
    )
    assert second.stop() and still_serves(server)


@pytest.mark.parametrize("listen", ["192.0.2.1:0", "no-such-host.invalid:0"])
def test_an_address_of_another_machine_cannot_be_bound(listen: str) -> None:
    with pytest.raises(ListenError, match=r"\Alisten: cannot [^\n]+\Z"):
        MetricsServer(example_store(), listen=listen).start()


def test_it_listens_on_loopback_unless_told_otherwise() -> None:
    assert MetricsServer(example_store()).address.host == "127.0.0.1"


def test_ipv6_where_the_machine_has_it() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with serving(listen="[::1]:0") as server:
        assert server.address.host == "::1" and still_serves(server)
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", server.address.port), timeout=5)


def test_no_host_means_all_interfaces() -> None:
    with serving(listen=":0") as server:
        socket.create_connection(("127.0.0.1", server.address.port), timeout=5).close()


def test_stop_is_quick_with_idle_and_stuck_clients() -> None:
    with serving(Rendering(b"# x\n" * 8_000_000)) as server, connect(server) as slow, connect(server) as idle:
        slow.sendall(b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n")
        assert eventually(lambda: server.stats().scrapes == 1 and server.stats().connections == 2)
        started = time.monotonic()
        assert server.stop(8.0)
        assert time.monotonic() - started < 10
        assert rest(idle) == b""
        with pytest.raises(OSError):
            connect(server).close()


def test_stop_lets_an_answer_end() -> None:
    entered = threading.Event()

    def render() -> None:
        entered.set()
        time.sleep(0.5)

    with serving(Rendering(b"x 1\n", render)) as server:
        answers: list[bytes] = []
        thread = threading.Thread(target=lambda: answers.append(get(server, "/metrics")[1]))
        thread.start()
        assert entered.wait(5) and server.stop(6.0)
        thread.join(5)
        assert answers == [b"x 1\n"]


def test_stop_does_not_wait_for_a_hung_rendering() -> None:
    release = threading.Event()
    with serving(Rendering(b"", lambda: release.wait(20))) as server, connect(server) as sock:
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n")
        assert eventually(lambda: server.stats().scrapes == 1)
        started = time.monotonic()
        assert not server.stop(1.0)
        assert time.monotonic() - started < 15 and rest(sock) == b""
        release.set()


def test_limits_must_be_positive() -> None:
    with pytest.raises(ValueError, match="idle_seconds"):
        ServerLimits(idle_seconds=0)
