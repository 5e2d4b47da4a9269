"""A small sender of the record stream: what SGLang, Triton or TensorRT-LLM would have to do to feed it.

It plays an engine with one request, as one process with the roles frontend and core, each on a connection of
its own: it introduces itself, starts a request, tells which KV blocks the request holds, ends it, and sends
the tenant's sums, which it keeps until the agent has acknowledged them. STREAM.md describes every record.

Needs the standard library and msgspec, nothing of vLLM and nothing of GPUGlass.
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import time

import msgspec

BLOCKS, BLOCK_BYTES, BLOCK_TOKENS = 1000, 2_097_152, 16


class Sender:
    """One connection, one role."""

    def __init__(self, path: str, role: str, hello: dict[str, object]) -> None:
        self.sums: dict[int, bytes] = {}
        self._role, self._seq = role, 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(path)
        self.send({**hello, "type": "hello", "role": role, "sender": secrets.token_hex(8)})

    def send(self, *records: dict[str, object]) -> None:
        """States and events: seq 0, not acknowledged. A real sender sets MSG_DONTWAIT and drops events
        when the socket is full."""
        self._socket.send(msgspec.msgpack.encode({"seq": 0, "records": records}))
        print(f"{self._role}: sent {', '.join(str(record['type']) for record in records)}")

    def send_sums(self, *records: dict[str, object]) -> None:
        """Sums: kept until acknowledged, and sent again first thing on the next connection."""
        self._seq += 1
        packet = msgspec.msgpack.encode({"seq": self._seq, "records": records})
        self.sums[self._seq] = packet
        self._socket.send(packet)
        print(f"{self._role}: sent sums, seq {self._seq}")

    def wait_for_acks(self, seconds: float) -> bool:
        """Forget the sums that are taken in; whether all are."""
        self._socket.settimeout(seconds)
        while self.sums:
            data = self._socket.recv(256)
            if not data:
                return False
            ack = msgspec.msgpack.decode(data)["ack"]
            self.sums = {seq: packet for seq, packet in self.sums.items() if seq > ack}
            print(f"{self._role}: acknowledged up to {ack}")
        return True

    def close(self) -> None:
        """Leave."""
        self._socket.close()


def main() -> int:
    """Play one request."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--socket", default=os.environ.get("GPUGLASS_SOCKET", "/run/gpuglass/agent.sock"))
    parser.add_argument("--tenant", default="team-a")
    parser.add_argument("--model", default="example")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long the request runs")
    arguments = parser.parse_args()
    tenant, now = arguments.tenant, time.monotonic_ns
    offset = time.time_ns() - now()
    hello = {
        **{"version": 1, "instance": secrets.token_hex(8), "clock_offset_ns": offset},
        **{"engine_name": "example", "engine_version": "1.0", "software": "example_sender/1"},
        **{"model_name": arguments.model, "engine": "0"},
    }
    pool = {"blocks": BLOCKS, "block_bytes": BLOCK_BYTES, "block_tokens": BLOCK_TOKENS}
    frontend = Sender(arguments.socket, "frontend", hello)
    core = Sender(arguments.socket, "core", {**hello, "pool": pool})

    request, begin = f"example-{secrets.token_hex(4)}", now()
    trace = secrets.token_hex(16)
    start = {"type": "request_start", "at": begin, "request_id": request, "tenant": tenant}
    frontend.send({**start, "trace_id": trace, "prompt_tokens": 1600, "max_tokens": 200})
    core.send(
        {"type": "pool", "at": now(), "used_blocks": 113, "running": 1},
        {"type": "request_progress", "at": now(), "request_id": request, "tenant": tenant}
        | {"running": True, "blocks": 113.0, "peak_blocks": 113.0, "computed_tokens": 1800},
    )
    time.sleep(arguments.seconds)

    end, held = now(), 113.0
    ran = end - begin
    core.send(
        {"type": "request_end", "at": end, "request_id": request, "tenant": tenant, "outcome": "length"}
        | {"arrival_ns": begin, "queue_ns": 0, "prefill_ns": ran // 4, "decode_ns": ran - ran // 4}
        | {"prompt_tokens": 1600, "output_tokens": 200, "peak_blocks": held, "kv_block_ns": held * ran},
    )
    core.send_sums(
        {"type": "tenant", "tenant": tenant, "kv_block_ns": held * ran, "prompt_tokens": 1600}
        | {"output_tokens": 200, "requests": {"length": 1}},
    )
    frontend.send(
        {"type": "request_answered", "at": end, "request_id": request, "outcome": "length"}
        | {"duration_ns": ran, "first_token_ns": ran // 4},
    )
    core.send({"type": "pool", "at": now(), "used_blocks": 0})
    acknowledged = core.wait_for_acks(10)
    print(f"request {request}, trace {trace}: {'all taken in' if acknowledged else 'not acknowledged'}")
    frontend.close()
    core.close()
    return 0 if acknowledged else 1


if __name__ == "__main__":
    raise SystemExit(main())
