"""Requests to a vLLM server from tests: single ones, and many at once from threads.

In: an address, prompts as token ids, headers. Out: what the client saw of each request, token counts as the
server's own `usage` tells them. Output always has the full length (`ignore_eos`), greedily.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.support.vllm import MODEL

TIMEOUT = 100
"""Seconds until a request that hangs fails; less than a test's own time."""

Prompt = Sequence[int] | Sequence[Sequence[int]]
"""Token ids of one sequence, or of several in one request."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a client saw of one request."""

    status: int
    """HTTP status; 0 if the connection broke before there was one."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reasons: tuple[str, ...] = ()
    chunks: int = 0
    """Pieces of a stream that held a token."""
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether it was answered to the end."""
        return self.status == 200 and not self.error


def tokens(number: int, seed: int = 0) -> list[int]:
    """A prompt of that many tokens; prompts of different seeds share no block."""
    return [(seed + seed * position + position) % 251 for position in range(number)]


def trace_id(number: int) -> str:
    """A trace id of 32 hex digits."""
    return f"{number + 1:032x}"


def traceparent(number: int) -> str:
    """The W3C header of that trace, sampled."""
    return f"00-{trace_id(number)}-{number + 1:016x}-01"


def body(prompt: Prompt, max_tokens: int, **more: Any) -> dict[str, Any]:
    """The JSON of a /v1/completions request."""
    fixed = {"model": MODEL, "temperature": 0, "ignore_eos": True}
    return {**fixed, "prompt": prompt, "max_tokens": max_tokens, **more}


def complete(
    address: str,
    prompt: Prompt,
    max_tokens: int,
    *,
    stream: bool = False,
    hang_up_after: int | None = None,
    at_chunk: Callable[[int], None] | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT,
    **more: Any,
) -> Reply:
    """Send one request and read its answer; nothing is raised, what went wrong is in the reply.

    `hang_up_after` streams and closes the connection after that many pieces; `at_chunk` streams and is called
    with the number of each piece.
    """
    connection = http.client.HTTPConnection(address, timeout=timeout)
    streamed = stream or hang_up_after is not None or at_chunk is not None
    if streamed:
        more |= {"stream": True, "stream_options": {"include_usage": True}}
    status = 0
    try:
        sent = json.dumps(body(prompt, max_tokens, **more))
        head = {"Content-Type": "application/json", **(headers or {})}
        connection.request("POST", "/v1/completions", sent, head)
        answer = connection.getresponse()
        status = answer.status
        if status != 200:
            return Reply(status, error=answer.read().decode(errors="replace")[:500])
        if streamed:
            return _stream(answer, hang_up_after, at_chunk)
        document = json.loads(answer.read())
        reasons = tuple(choice["finish_reason"] for choice in document["choices"])
        usage = document["usage"]
        return Reply(200, usage["prompt_tokens"], usage["completion_tokens"], reasons)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Reply(status, error=repr(error))
    finally:
        connection.close()


def _stream(
    answer: http.client.HTTPResponse, hang_up_after: int | None, at_chunk: Callable[[int], None] | None
) -> Reply:
    chunks, usage = 0, {"prompt_tokens": 0, "completion_tokens": 0}
    reasons: list[str] = []
    for line in answer:
        data = line.decode().strip().removeprefix("data: ")
        if not data:
            continue
        if data == "[DONE]":
            return Reply(200, usage["prompt_tokens"], usage["completion_tokens"], tuple(reasons), chunks)
        document = json.loads(data)
        if "error" in document:
            return Reply(200, error=str(document["error"])[:500], chunks=chunks)
        usage = document.get("usage") or usage
        reasons += [choice["finish_reason"] for choice in document["choices"] if choice["finish_reason"]]
        if document["choices"]:
            chunks += 1
            if at_chunk is not None:
                at_chunk(chunks)
        if hang_up_after is not None and chunks >= hang_up_after:
            return Reply(200, error="hung up", chunks=chunks)
    return Reply(200, error="the stream ended early", chunks=chunks)


def complete_all(address: str, requests: Iterable[Mapping[str, Any]], *, at_once: int = 64) -> list[Reply]:
    """Send requests (keyword arguments of `complete`) from that many threads; replies in their order."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda request: complete(address, **request), requests))


@dataclass
class Load:
    """Requests that run until `stop`."""

    replies: dict[str, list[Reply]] = field(default_factory=dict)
    """By the name of the stream of requests."""
    _stopping: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def stop(self) -> None:
        """Let each open request end, and send no more."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def usage(self, name: str) -> tuple[int, int, int]:
        """Requests, prompt tokens and output tokens of the answered requests of a stream."""
        good = [reply for reply in self.replies[name] if reply.ok]
        return len(good), sum(r.prompt_tokens for r in good), sum(r.output_tokens for r in good)

    def failed(self) -> list[Reply]:
        """Replies that were no good answers."""
        return [reply for replies in self.replies.values() for reply in replies if not reply.ok]

    def answered(self) -> int:
        """Requests answered so far."""
        return sum(len(replies) for replies in self.replies.values())


@contextmanager
def running_load(
    address: str,
    streams: Mapping[str, Callable[[int], Mapping[str, Any]]],
    pause: float = 0.0,
) -> Iterator[Load]:
    """One thread per stream sends request after request; a stream makes the arguments of its n-th request."""
    load = Load()

    def run(name: str, make: Callable[[int], Mapping[str, Any]]) -> None:
        number = 0
        while not load._stopping.is_set():
            load.replies[name].append(complete(address, **make(number)))
            number += 1
            time.sleep(pause)

    for name, make in streams.items():
        load.replies[name] = []
        load._threads.append(threading.Thread(target=run, args=(name, make), daemon=True))
    for thread in load._threads:
        thread.start()
    try:
        yield load
    finally:
        load.stop()
