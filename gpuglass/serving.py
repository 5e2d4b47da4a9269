"""From the section `server` of a configuration to a running server, with errors that name the key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gpuglass
from gpuglass.config import ServerConfig
from gpuglass.errors import ConfigError
from gpuglass.server import ListenError, MetricsServer, ServerLimits, WebConfigError
from gpuglass.store import Store


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except ListenError as error:
        raise ConfigError(f"server.{error}") from None
    except WebConfigError as error:
        raise ConfigError(f"server.web_config_file: {error}") from None


def make_server(
    config: ServerConfig, store: Store, *, readiness: Callable[[], str | None], title: str
) -> MetricsServer:
    """A server of a store that does not listen yet. Raises ConfigError."""
    with _named():
        return MetricsServer(
            store,
            listen=config.listen,
            web_config=Path(config.web_config_file) if config.web_config_file else None,
            limits=ServerLimits(
                connections=config.max_connections,
                scrapes=config.max_scrapes,
                request_seconds=config.request_timeout,
                idle_seconds=config.idle_timeout,
            ),
            readiness=readiness,
            title=title,
            version=gpuglass.__version__,
        )


def start_server(server: MetricsServer) -> None:
    """Listen and serve. Raises ConfigError."""
    with _named():
        server.start()
