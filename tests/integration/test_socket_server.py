"""Sockets over the real server, with a network that is played: what a client can do to it by reading slowly or not at all."""

# ruff: noqa: ARG002 - the interface has these arguments
from __future__ import annotations

import asyncio
import math
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import closing, contextmanager, suppress

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.played import PlayedNetwork
from tests.processes import eventually
from tests.sockets import talk, text_of
from tether.errors import ErrorInfo
from tether.gateway import create_app
from tether.http import bind, make_server
from tether.messages import JobAccepted, JobEnd, JobEvent, JobTokens
from tether.records import Job, Usage
from tether.settings import GatewaySettings

PIECE = "x" * 1024


class Torrent(PlayedNetwork):
    """Every job's answer has a kilobyte in each token, and so many of them as `max_tokens` says."""

    def __init__(self) -> None:
        super().__init__()
        self.num_told: dict[str, int] = {}

    async def follow(self, job: Job, stays: bool = False) -> AsyncGenerator[list[JobEvent], None]:
        try:
            yield [JobAccepted(job.id, "running", "1.0")]
            for position in range(job.sampling.max_tokens):
                await asyncio.sleep(0)
                self.num_told[job.id] = position + 1
                yield [JobTokens(job.id, 1, position, (position,), PIECE)]
            yield [JobEnd(job.id, "completed", 1, "stop", Usage(1, 1))]
        finally:
            self.num_closed += 1


@contextmanager
def serving(network: PlayedNetwork, settings: GatewaySettings) -> Iterator[str]:
    """Serve a network over HTTP in a thread, and yield its URL."""
    sock = bind("127.0.0.1", 0)
    stop: list[object] = []

    async def main() -> None:
        stopping = asyncio.Event()
        server = make_server(create_app(network, settings, stopping), settings, 5.0)
        loop = asyncio.get_running_loop()

        def on_stop() -> None:
            server.should_exit = True
            stopping.set()

        stop.append(lambda: loop.call_soon_threadsafe(on_stop))
        await server.serve(sockets=[sock])

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    with closing(sock):
        thread.start()
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            eventually(lambda: stop, what="the server's start")
            for each in stop:
                assert callable(each)
                each()
            thread.join(20)
    assert not thread.is_alive()


def narrow(url: str) -> socket.socket:
    """Return a connection whose own buffer is small."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
    host, port = url.removeprefix("http://").split(":")
    sock.connect((host, int(port)))
    return sock


def test_a_client_that_does_not_read_holds_its_jobs_back_and_nobody_else_and_reads_all_of_it_later() -> None:
    network = Torrent()
    with serving(network, GatewaySettings(keepalive_seconds=60.0)) as url, talk(url, sock=narrow(url)) as slow:
        for name in ("a", "b"):
            slow.chat(name, "x", fields={"max_tokens": 20_000})
        before: dict[str, int] = {}

        def stands_still() -> bool:
            nonlocal before
            now = dict(network.num_told)
            is_same, before = now == before and len(now) == 2, now
            return is_same

        eventually(stands_still, what="jobs that wait for their client")
        assert sum(before.values()) * len(PIECE) < 12 << 20, "of 40 MiB, what the machine's own buffers hold"
        with talk(url) as other:
            other.chat("c", "x", fields={"max_tokens": 100})
            assert text_of(other.run("c")) == PIECE * 100
        heard = slow.until("done")
        heard += slow.until("done")
        for name in ("a", "b"):
            assert len(text_of([message for message in heard if message["id"] == name])) == 20_000 * len(PIECE)


def test_a_client_that_answers_no_ping_is_cut_off_and_its_jobs_end() -> None:
    network = Torrent()
    settings = GatewaySettings(keepalive_seconds=0.2, pong_seconds=0.3)
    with serving(network, settings) as url, talk(url, sock=narrow(url), max_queue=1) as dead:
        dead.chat("a", "x", fields={"max_tokens": 100_000})
        eventually(lambda: network.num_closed == 1, what="the job's end")
        assert dead.closing()[0] in {None, 1011}


def test_a_client_that_is_silent_but_there_is_kept() -> None:
    with serving(Torrent(), GatewaySettings(keepalive_seconds=0.05, pong_seconds=0.2)) as url, talk(url) as idle:
        with pytest.raises(TimeoutError):
            idle.hear(1.0)
        idle.say(type="ping")
        assert idle.hear() == {"type": "pong"}


def test_a_client_that_sends_and_does_not_read_is_not_read_either() -> None:
    with serving(Torrent(), GatewaySettings(keepalive_seconds=60.0)) as url, closing(narrow(url)) as raw:
        with talk(url, sock=raw, max_queue=1) as flood:
            sent = threading.Semaphore(0)

            def send() -> None:
                with suppress(ConnectionClosed, OSError):
                    while True:
                        flood.say(type="cancel", id="nobody" * 20)
                        sent.release()

            sending = threading.Thread(target=send, daemon=True)
            sending.start()
            while sent.acquire(timeout=1.0):
                assert sending.is_alive()
            raw.shutdown(socket.SHUT_RDWR)
            sending.join(20)
            assert not sending.is_alive()
        with talk(url) as other:
            other.say(type="ping")
            assert other.hear() == {"type": "pong"}


def test_an_end_that_cannot_be_written_is_an_error_of_the_job_and_no_silence() -> None:
    never = ErrorInfo("queue_full", "full", retry_after_seconds=math.inf)
    network = PlayedNetwork(JobEnd("j", "failed", 1, "error", Usage(), never))
    with serving(network, GatewaySettings()) as url, talk(url) as client:
        for _ in range(2):
            client.chat("a", "x")
            (*_, last) = client.run("a")
            assert (last["type"], last["status"], last["error"]["code"]) == ("error", 500, "internal_error")
            assert last["job_id"] == network.jobs_seen[-1].id


def test_one_socket_too_many_is_refused_as_a_request_would_be() -> None:
    with serving(Torrent(), GatewaySettings(max_sockets=1)) as url, talk(url) as first:
        with pytest.raises(InvalidStatus) as caught, talk(url):
            pass
        assert (caught.value.response.status_code, caught.value.response.headers["retry-after"]) == (503, "2")
        first.say(type="ping")
        assert first.hear() == {"type": "pong"}
