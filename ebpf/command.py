"""`gpuglass cuda-tracer`: the privileged process on each node that keeps the ledger of CUDA memory."""

from __future__ import annotations

import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from gpuglass.command import Command


def _pid(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 1 << 22:
        raise ArgumentTypeError(f"{text!r} is no process id")
    return int(text)


def _configure(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="configuration file (default: GPUGLASS_CONFIG); section tracer",
    )
    parser.add_argument("--listen", metavar="ADDRESS", help="address and port; overrides tracer.listen")
    parser.add_argument(
        "--loader",
        choices=("auto", "core", "bcc"),
        help="core: the prebuilt object through libbpf; bcc: compile on the node; auto: core, else bcc",
    )
    parser.add_argument("--object", metavar="FILE", help="the prebuilt object; overrides tracer.object")
    parser.add_argument("--runtime", action="store_true", help="trace libcudart, too, as a ledger of its own")
    parser.add_argument(
        "--tensors", action="store_true", help="trace PyTorch's allocator, too: live tensors (Linux 6.6)"
    )
    parser.add_argument(
        "--launches", choices=("off", "graphs", "all"), help="count launches; about a microsecond each"
    )
    parser.add_argument(
        "--pid",
        metavar="PID",
        type=_pid,
        action="append",
        default=[],
        help="trace only this process; repeatable",
    )
    parser.add_argument(
        "--check", action="store_true", help="load the program, say what would be traced, and end"
    )


_OVERRIDES = ("listen", "loader", "object", "launches")


def _run(arguments: Namespace) -> int:
    for name in _OVERRIDES:
        if value := getattr(arguments, name):
            os.environ[f"GPUGLASS_TRACER_{name.upper()}"] = value
    for name in ("runtime", "tensors"):
        if getattr(arguments, name):
            os.environ[f"GPUGLASS_TRACER_{name.upper()}"] = "true"
    from gpuglass.config import load
    from gpuglass.errors import ConfigError
    from gpuglass.logs import LOG, configure

    config = load(arguments.config)
    configure(config.log)

    from ebpf import gate

    gate.check(config.tracer.allow)
    from gpuglass.procfs import PidView, ProcFs

    namespace = ProcFs(config.proc).pid_namespace()
    if namespace.view is PidView.PRIVATE:
        raise ConfigError(f"the CUDA tracer needs the host's pids: {namespace.reason}")

    import gpuglass
    from ebpf.tracer import Tracer, stop_on_signals
    from gpuglass import catalog
    from gpuglass.family import Owner
    from gpuglass.server import ListenError, MetricsServer
    from gpuglass.store import Store

    store = Store(catalog.owned_by(Owner.TRACER))
    try:
        tracer = Tracer(config, store.publish, frozenset(arguments.pid))
    except OSError as error:
        raise ConfigError(f"the kernel refuses the CUDA tracer: {error}") from None
    if arguments.check:
        tracer.discovery.host()
        print(
            f"loaded by {tracer.loader}; an empty pair of probes costs {1e6 * (tracer.pair or 0):.1f} µs here"
        )
        for attachment in tracer.attacher.all():
            print(f"{attachment.path}: {attachment.functions} functions")
        tracer.close()
        return 0
    try:
        server = MetricsServer(
            store, listen=config.tracer.listen, title="GPUGlass CUDA tracer", version=gpuglass.__version__
        )
        server.start()
    except ListenError as error:
        tracer.close()
        raise ConfigError(f"tracer.{error}") from None
    stop_on_signals(tracer.stop)
    LOG.info("serving http://%s/metrics; loader %s", server.address, tracer.loader)
    tracer.run()
    server.stop(2.5)
    return 0


COMMAND = Command(
    "keep the ledger of CUDA memory by eBPF (needs rights)",
    _configure,
    _run,
    "Trace the CUDA memory of all processes of this node with BPF and serve it for Prometheus until "
    "SIGTERM. Exit code 2, "
    "with one line, where rights, kernel or architecture do not allow it.",
    "  gpuglass cuda-tracer --check\n  gpuglass cuda-tracer\n"
    "  gpuglass cuda-tracer --loader bcc --runtime\n  gpuglass cuda-tracer --pid 4711 --listen "
    "127.0.0.1:9000",
)
