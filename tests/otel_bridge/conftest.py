"""What the tests of the bridge share: certificates, one Jaeger, one vLLM (both started ahead)."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support import tools, vllm_environment
from tests.support.ahead import prepared, short_folder
from tests.support.jaeger import Jaeger, running_jaeger
from tests.support.vllm import RunningVllm, running_vllm
from tests.support.vllm_models import make_model


@dataclass(frozen=True, slots=True)
class Certificates:
    """A certificate for localhost that signs itself, and its key."""

    certificate: Path
    key: Path


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Made once."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    found = Certificates(folder / "tls.crt", folder / "tls.key")
    found.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    found.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return found


def _jaeger_program() -> Path:
    program = tools.JAEGER.program("jaeger")
    assert program, 'mark the test with @pytest.mark.needs("jaeger")'
    return program


def _make_jaeger(stack: ExitStack) -> Jaeger:
    return stack.enter_context(running_jaeger(_jaeger_program(), short_folder(stack)))


JAEGER = prepared("jaeger", _make_jaeger)


@pytest.fixture(scope="session")
def jaeger_program() -> Path:
    """Jaeger 2; needs jaeger."""
    return _jaeger_program()


@pytest.fixture(scope="session")
def jaeger() -> Iterator[Jaeger]:
    """One Jaeger for all tests; needs jaeger."""
    yield JAEGER.get()
    JAEGER.close()


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder with a short name."""
    with ExitStack() as stack:
        yield short_folder(stack)


@dataclass(frozen=True, slots=True)
class Traced:
    """A real vLLM with the probe that exports traces of its own, too."""

    server: RunningVllm
    socket: Path
    """Where it looks for its agent."""
    jaeger: Jaeger


def _make_traced(stack: ExitStack) -> Traced:
    folder = short_folder(stack)
    model = make_model("tiny-qwen3-moe", short_folder(stack))
    site = vllm_environment.site_folder(short_folder(stack))
    args = (
        *("--block-size", "32", "--num-gpu-blocks-override", "80", "--max-num-batched-tokens", "512"),
        *("--middleware", "gpuglass_vllm.middleware.Middleware", "--otlp-traces-endpoint", JAEGER.get().grpc),
    )
    env = {"OTEL_SERVICE_NAME": "vllm-itself", "OTEL_BSP_SCHEDULE_DELAY": "500", "GPUGLASS_STEPS_EVERY": "10"}
    socket = folder / "agent.sock"
    server = running_vllm(folder, model, args, site=site, socket=socket, env=env)
    return Traced(stack.enter_context(server), socket, JAEGER.get())


TRACED = prepared("traced", _make_traced)


@pytest.fixture(scope="session")
def traced(jaeger: Jaeger) -> Iterator[Traced]:
    """One server for all tests: chunked prefill, 79 blocks of 32 tokens; needs vllm and jaeger."""
    yield TRACED.get()
    TRACED.close()
