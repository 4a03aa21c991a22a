"""Runs the gateway's HTTP application beside a node: uvicorn on asyncio here, the node on trio behind the bridge."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import AsyncGenerator, Callable, Iterator
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from tether.access_log import AccessLog
from tether.batch_messages import BatchQuestion
from tether.bridge import Bridge
from tether.door import why_broken_off
from tether.errors import JobNotFound, NoOrchestrator, PortTaken, UsageError
from tether.gateway import create_app
from tether.messages import Authenticated, Health, JobAccepted, JobEvent, KeyClaimed
from tether.node import Node, calm_collector, exit_code, force_exit
from tether.protocol import BoundedProtocol, SocketProtocol
from tether.records import Actor, Explanation, Job, JobRecord, JobStatus, ServedModel
from tether.settings import GatewaySettings
from tether.store import Store, open_store
from tether.submissions import A
from tether.tenancy import authenticate
from tether.tenant_store import TenantStore

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75
"""How long an idle connection is kept: longer than nginx keeps its own (60 s), so that it is not we who close one just as
it is used again."""


MAX_MESSAGE_BYTES = 4 << 20
"""A larger message on a socket ends it; up to here the application can say what is wrong with it."""


class BridgedNetwork:
    """The network as the HTTP side sees it: the node's submissions, across the bridge.

    With `reader`, a store of the gateway's own, jobs are read there, also while no orchestrator answers.
    """

    def __init__(self, bridge: Bridge[Node], reader: Store | None) -> None:
        self._bridge = bridge
        self._submissions = bridge.started.submissions
        self._reader = reader
        self._tenants = TenantStore(reader) if reader is not None else None

    def follow(self, job: Job, stays: bool = False) -> AsyncGenerator[list[JobEvent], None]:
        """Submit a job and yield its events; closed early, it cancels the job, unless that `stays`."""
        return self._bridge.stream(self._submissions.follow, job, stays, why=why_broken_off())

    def watch(self, job_id: str, tenant_id: str | None) -> AsyncGenerator[list[JobEvent], None]:
        """Yield a job's events from its beginning, wherever it was submitted."""
        return self._bridge.stream(self._submissions.watch, job_id, tenant_id)

    async def claim(self, tenant_id: str, key: str, fingerprint: str, job_id: str) -> KeyClaimed:
        """Give a client's idempotency key to a job; return whose it is."""
        return await self._bridge.call(self._submissions.claim, tenant_id, key, fingerprint, job_id)

    async def models(self) -> list[ServedModel]:
        """Return the models that can be served now."""
        return await self._bridge.call(self._submissions.models)

    async def submit(self, job: Job) -> JobAccepted:
        """Submit a job that nobody waits for."""
        return await self._bridge.call(self._submissions.submit, job)

    async def job(self, job_id: str, tenant_id: str | None) -> JobRecord:
        """Return a job's record; raise `JobNotFound`."""
        if self._reader is None:
            return await self._bridge.call(self._submissions.job, job_id, tenant_id)
        record = await asyncio.to_thread(self._reader.job, job_id, tenant_id)
        if record is None:
            raise JobNotFound(f"there is no job {job_id!r}")
        return await self._bridge.call(self._submissions.with_place, record)

    async def jobs(
        self, tenant_id: str | None, status: JobStatus | None, model: str | None, before: str | None, limit: int
    ) -> list[JobRecord]:
        """Return a page of jobs, newest first."""
        if self._reader is None:
            return await self._bridge.call(self._submissions.jobs, tenant_id, status, model, before, limit)
        return await asyncio.to_thread(self._reader.jobs, tenant_id, status, model, before, limit)

    async def cancel(self, job_id: str, tenant_id: str | None, by: Actor | None = None) -> JobRecord:
        """End a job; return its record after its end."""
        return await self._bridge.call(self._submissions.cancel, job_id, tenant_id, by)

    async def forget(self, job_id: str, tenant_id: str | None, by: Actor | None = None) -> JobRecord:
        """Drop what is kept of a job that has ended; return its record then."""
        return await self._bridge.call(self._submissions.forget, job_id, tenant_id, by)

    async def explain(self, job: Job, *, sees_all: bool) -> Explanation:
        """Return what would happen to a job that came now."""
        return await self._bridge.call(partial(self._submissions.explain, job, sees_all=sees_all))

    async def authenticate(self, key_digest: str | None) -> Authenticated:
        """Return whom an API key stands for; with a store of the gateway's own, it is looked up there."""
        if self._tenants is None:
            return await self._bridge.call(self._submissions.authenticate, key_digest)
        return await asyncio.to_thread(authenticate, self._tenants, key_digest)

    async def ask(self, make_question: Callable[[int], BatchQuestion], reply_type: type[A]) -> A:
        """Ask an orchestrator about files or batches; raise what it says is wrong."""
        return await self._bridge.call(self._submissions.ask, make_question, reply_type)

    async def health(self) -> Health:
        """Return whether jobs can be served."""
        return await self._bridge.call(self._submissions.health)


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; raise `PortTaken` or `UsageError` with what to do."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)
    except OSError as exc:
        sock.close()
        if exc.errno == errno.EADDRINUSE:
            raise PortTaken(
                f"port {port} on {host} is taken by another program; choose another one with --port"
            ) from exc
        raise UsageError(f"cannot listen on {host} port {port}: {exc.strerror}") from exc
    return sock


OnStarted = Callable[[Node, str, bool], None]


def run_gateway(
    node: Node, settings: GatewaySettings, *, on_started: OnStarted = lambda _node, _url, _needs_key: None
) -> int:
    """Run the gateway and its node until a signal ends them; return the exit code.

    `on_started` is told the address when both listen, and whether a key is known to be needed. Raises what ended the node, if it was not a signal, and `UsageError`
    for an address that others can reach while the network has no API key.
    """
    if node.plan.orchestrator is not None:
        check_public(settings, has_keys=not settings.is_loopback and TenantStore(node.store).has_keys())
    sock = bind(settings.host, settings.port)
    with contextlib.closing(sock), contextlib.ExitStack() as stack:
        reader = stack.enter_context(contextlib.closing(open_store(settings.store))) if settings.store else None
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_serve(node, settings, sock, reader, on_started))


async def _serve(
    node: Node,
    settings: GatewaySettings,
    sock: socket.socket,
    reader: Store | None,
    on_started: OnStarted,
) -> int:
    received: list[int] = []
    async with Bridge[Node](node.run) as bridge:
        stopping = asyncio.Event()
        app = create_app(BridgedNetwork(bridge, reader), settings, stopping)
        server = make_server(app, settings, node.plan.node.grace_seconds)

        def on_signal(number: int) -> None:
            received.append(number)
            if server.should_exit:
                force_exit(number)
            log.info(
                "stopping; running requests have %g s (Ctrl-C again to stop at once)", node.plan.node.grace_seconds
            )
            server.should_exit = True
            stopping.set()
            loop.call_later(node.plan.node.grace_seconds, bridge.stop)

        def on_death(_: asyncio.Future[None]) -> None:
            server.should_exit = True
            stopping.set()

        if not settings.is_loopback and node.plan.orchestrator is None:
            await _check_keys(BridgedNetwork(bridge, reader), settings)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal, number)
        # A node that dies takes its gateway with it: there is nobody left to serve a request.
        bridge.done.add_done_callback(on_death)
        host, port = sock.getsockname()[:2]
        calm_collector()
        needs_key = not settings.is_loopback
        if node.plan.orchestrator is not None:
            needs_key = await asyncio.to_thread(TenantStore(node.store).has_keys)
        on_started(node, f"http://{f'[{host}]' if ':' in host else host}:{port}", needs_key)
        await server.serve(sockets=[sock])
    return exit_code(received[0] if received else None)


def make_server(app: ASGIApp, settings: GatewaySettings, grace_seconds: float) -> uvicorn.Server:
    """Return the HTTP server for an application; stopped, it ends within a little more than `grace_seconds`."""
    config = uvicorn.Config(
        AccessLog(app, is_on=settings.access_log),
        http=BoundedProtocol,
        ws=SocketProtocol,
        ws_max_size=MAX_MESSAGE_BYTES,
        ws_ping_interval=settings.keepalive_seconds,
        ws_ping_timeout=settings.pong_seconds,
        ws_per_message_deflate=False,  # a few hundred bytes a message, and memory for each socket
        lifespan="off",
        access_log=False,
        log_config=None,
        proxy_headers=True,
        forwarded_allow_ips=settings.trusted_proxies,
        # The bridge ends what still runs after the grace time, each request with an error of its own form.
        timeout_graceful_shutdown=round(grace_seconds) + 5,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        server_header=False,
    )
    return _Server(config)


def check_public(settings: GatewaySettings, *, has_keys: bool) -> None:
    """Raise `UsageError` for a gateway that others could reach and that would let everybody in."""
    if not settings.is_loopback and not has_keys:
        raise UsageError(
            f"--host {settings.host} would let anybody in, because this network has no API key yet: make one with "
            "`tether keys create --tenant NAME`, or listen on 127.0.0.1"
        )


async def _check_keys(network: BridgedNetwork, settings: GatewaySettings) -> None:
    """Ask for keys before the first request. Whoever cannot be asked now is asked with each request, and none gets in."""
    try:
        answer = await network.authenticate(None)
    except NoOrchestrator as exc:
        log.warning("nobody can say yet whether there are API keys; until then no request is let in (%s)", exc.message)
    else:
        check_public(settings, has_keys=answer.required)


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers, which would end the process before the node has said goodbye."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's loop where the platform has it."""
    try:
        import uvloop  # noqa: PLC0415 - not there on every platform
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
