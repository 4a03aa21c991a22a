"""The store on a real rqlited: the contract, and what can go wrong on the way there and back."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.ports import free_port
from tests.rqlited import Cluster, Rqlited, running, running_cluster
from tests.store_contract import (
    NOW,
    TABLES,
    WORKER,
    OpenStore,
    StoreContract,
    admit,
    complete,
    job,
    record,
    requests_used,
    running_ledger,
    trio_test,
)
from tether.database import RqliteDatabase, Statement
from tether.errors import InternalError, SchemaError, StoreUnavailable
from tether.store import Store, open_store
from tether.tenant_store import TenantStore

pytestmark = pytest.mark.rqlite


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rqlited]:
    with running(tmp_path_factory.mktemp("rqlited")) as server:
        yield server


@pytest.fixture
def open_store_again(server: Rqlited) -> Iterator[OpenStore]:
    opened: list[Store] = []

    def again() -> Store:
        opened.append(open_store(server.url))
        return opened[-1]

    yield again
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store_again: OpenStore) -> Store:
    store = open_store_again()
    store.migrate()
    store._database.execute([Statement(f"DELETE FROM {table}", {}) for table in TABLES])
    return store


class TestRqliteStore(StoreContract):
    """The whole contract."""


# --- one host --------------------------------------------------------------------------------------------------------


def test_a_store_without_tables_says_what_to_run(tmp_path: Path) -> None:
    with running(tmp_path) as server, contextlib.closing(open_store(server.url)) as store:
        store.ping()
        with pytest.raises(SchemaError, match="tether store migrate"):
            store.check()
        with pytest.raises(SchemaError, match="tether store migrate"):
            store.counts()
        with pytest.raises(SchemaError, match="tether store migrate"):
            TenantStore(store).set_tenant("tenant-1")


def test_a_host_where_nobody_answers_is_named_after_the_deadline() -> None:
    port = free_port()
    with contextlib.closing(open_store(f"rqlite://127.0.0.1:{port}", deadline_seconds=0.2)) as store:
        with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{port}") as caught:
            store.ping()
        assert caught.value.retry_after_seconds


def test_a_dead_first_host_is_passed_over(server: Rqlited) -> None:
    url = f"rqlite://127.0.0.1:{free_port()},{server.http_address}"
    with contextlib.closing(open_store(url)) as store:
        store.migrate()
        TenantStore(store).set_tenant("tenant-1", now=NOW)
        assert TenantStore(store).tenant("tenant-1") is not None


def test_a_restarted_server_is_reached_again_and_kept_what_it_was_told(tmp_path: Path) -> None:
    with running(tmp_path) as server, contextlib.closing(open_store(server.url)) as store:
        store.migrate()
        TenantStore(store).set_tenant("tenant-1", requests_per_minute=7, now=NOW)
        server.kill()
        server.start()
        tenant = TenantStore(store).tenant("tenant-1")  # waits for it
        assert tenant is not None
        assert tenant.most("requests_per_minute") == 7


def test_users_and_passwords_are_sent_and_a_wrong_one_is_named_at_once(tmp_path: Path) -> None:
    password = "p@ss:w/rd" * 20
    users = tmp_path / "users.json"
    anybody = {"username": "*", "perms": ["ready"]}
    users.write_text(json.dumps([{"username": "tether", "password": password, "perms": ["all"]}, anybody]))
    quoted = "p%40ss%3Aw%2Frd" * 20
    with running(tmp_path, extra=("-auth", str(users))) as server:
        with contextlib.closing(open_store(f"rqlite://tether:{quoted}@{server.http_address}")) as store:
            store.migrate()
            store.check()
        for login in ("tether:wrong@", ""):
            store = open_store(f"rqlite://{login}{server.http_address}")
            with pytest.raises(StoreUnavailable, match="refuses this user"):
                store.ping()
            store.close()


def test_a_closed_store_stops_trying() -> None:
    store = open_store(f"rqlite://127.0.0.1:{free_port()}", deadline_seconds=60)
    failures: list[StoreUnavailable] = []

    def ask() -> None:
        try:
            store.ping()
        except StoreUnavailable as exc:
            failures.append(exc)

    thread = threading.Thread(target=ask)
    thread.start()
    store.close()
    thread.join(10)
    assert [failure.message for failure in failures] == ["the store is closed"]


# --- answers that get lost -------------------------------------------------------------------------------------------


class CuttingProxy:
    """Passes requests on to rqlited; the answers to the next `cuts` writes are thrown away with the connection."""

    def __init__(self, target: int) -> None:
        self.cuts = 0
        self.num_cut = 0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._open.add(client)
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._target)) as upstream:
            upstream.settimeout(10)
            while request := self._read(client):
                upstream.sendall(request)
                answer = upstream.recv(1 << 20)  # the commit is done
                if b"POST /db/execute" in request and self.cuts:
                    self.cuts -= 1
                    self.num_cut += 1
                    return
                client.sendall(answer)

    def _read(self, client: socket.socket) -> bytes:
        try:
            data = client.recv(1 << 16)
            while data and (b"\r\n\r\n" not in data or len(data) < _length(data)):
                data += client.recv(1 << 16)
        except OSError:
            return b""
        return data

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in self._open:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)


def _length(request: bytes) -> int:
    head, _, _ = request.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(head) + 4 + int(line.partition(b":")[2])
    return len(head) + 4


@trio_test
async def test_an_answer_that_is_lost_after_the_commit_does_no_harm(store: Store, server: Rqlited) -> None:
    with contextlib.closing(CuttingProxy(server.port)) as proxy:
        through = open_store(f"rqlite://127.0.0.1:{proxy.port}")
        async with running_ledger(through) as ledger:
            proxy.cuts = 2
            admission = await admit(ledger, job(requests_per_minute=1), WORKER._replace(slots=1))
            assert (admission.accepted, admission.reserved) == (True, True)
            proxy.cuts = 1
            assert await ledger.requeue("job-1", 1, status="lost", now=NOW)
            proxy.cuts = 1
            assert await ledger.reserve(
                "job-1", 2, worker=WORKER, orchestrator_id="orchestrator-1", orchestrator_boot="boot-1", now=NOW
            )
            proxy.cuts = 1
            assert await complete(ledger, "job-1", 2)
            assert proxy.num_cut == 5
        through.close()
    assert requests_used(store) == 1
    assert [attempt.status for attempt in store.attempts("job-1")] == ["lost", "completed"]
    assert record(store).result == "hi"


def test_an_operator_whose_answer_is_lost_is_told_what_was_done(store: Store, server: Rqlited) -> None:
    proxy = CuttingProxy(server.port)
    with (
        contextlib.closing(proxy),
        contextlib.closing(open_store(f"rqlite://127.0.0.1:{proxy.port}")) as through,
    ):
        tenants = TenantStore(through)
        proxy.cuts = 1
        tenants.create_tenant("tenant-1", now=NOW)
        key, record_of_key = tenants.create_key("tenant-1", now=NOW)
        assert key
        proxy.cuts = 1
        assert tenants.remove_tenant("tenant-1", now=NOW)
        assert not tenants.remove_tenant("tenant-1", now=NOW + 1)
        assert proxy.num_cut == 2
    actions = [event.action for event in store.audit_events()]
    assert sorted(actions) == ["key.created", "key.revoked", "tenant.created", "tenant.removed"]
    removed = TenantStore(store).key(record_of_key.id)
    assert removed is not None
    assert removed.revoked_at == NOW


@trio_test
async def test_lost_answers_to_batches_of_many_callers_do_no_harm(store: Store, server: Rqlited) -> None:
    reserved: list[str] = []
    with contextlib.closing(CuttingProxy(server.port)) as proxy:
        through = open_store(f"rqlite://127.0.0.1:{proxy.port}")

        async def run(number: int) -> None:
            new = job(f"job-{number}", requests_per_minute=50)
            if (await admit(ledger, new, WORKER._replace(slots=5))).reserved:
                reserved.append(new.id)
            if number % 5 == 0:
                proxy.cuts += 1

        async with running_ledger(through, max_batch=5) as ledger, trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(run, number)
        through.close()
    assert proxy.num_cut
    assert requests_used(store) == 50
    running_ids = [found.id for found in store.jobs(status="running")]
    assert sorted(running_ids) == sorted(reserved)
    assert len(reserved) == 5


# --- answers that are not rqlite's -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", StoreUnavailable, "does not answer as rqlite does"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"results": 12}', StoreUnavailable, "does not answer as"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"results":[]}', StoreUnavailable, "does not answer as"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 21\r\n\r\n{"error":"no leader"}', StoreUnavailable, "cannot be reached"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", StoreUnavailable, "HTTP 404"),
        (b"HTTP/1.1 503 X\r\nContent-Length: 16\r\n\r\nleader not found", StoreUnavailable, "leader not found"),
        (b"HTTP/1.1 301 X\r\nLocation: http://x/\r\nContent-Length: 0\r\n\r\n", StoreUnavailable, "HTTP 301"),
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\n\r\nbad", InternalError, "does not understand"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", StoreUnavailable, "cannot be reached"),
        (b"", StoreUnavailable, "cannot be reached"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{", StoreUnavailable, "cannot be reached"),
    ],
)
def test_whatever_answers_in_rqlite_s_place_is_an_error_of_ours(
    answer: bytes, error: type[Exception], message: str
) -> None:
    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                client.recv(1 << 16)
                client.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        url = f"rqlite://127.0.0.1:{listener.getsockname()[1]}"
        store = open_store(url, deadline_seconds=0.2)
        with pytest.raises(error, match=message):
            store.ping()
        with pytest.raises(error, match=message):
            TenantStore(store).set_tenant("tenant-1")
        store.close()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("database or disk is full", StoreUnavailable),
        ("disk I/O error", StoreUnavailable),
        ("attempt to write a readonly database", StoreUnavailable),
        ("database disk image is malformed", StoreUnavailable),
        ("no such table: jobs", SchemaError),
        ("table jobs has no column named x", SchemaError),
        ("UNIQUE constraint failed: jobs.id", InternalError),
    ],
)
def test_sqlite_s_words_through_rqlite_mean_what_its_codes_mean(
    words: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps({"results": [{"error": words}]}).encode()
    monkeypatch.setattr("tether.database._HttpClient.post", lambda *_, **__: (200, body))
    store = open_store("rqlite://127.0.0.1")
    with pytest.raises(error):
        TenantStore(store).set_tenant("tenant-1")
    with pytest.raises(error):
        store.ping()
    store.close()


# --- a cluster -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster")) as found:
        yield found


@trio_test
async def test_a_frozen_host_is_given_up_and_the_next_one_asked(cluster: Cluster) -> None:
    follower = cluster.nodes[cluster.followers[0]]
    rest = [node for node in cluster.nodes if node is not follower]
    store = open_store("rqlite://" + ",".join(server.http_address for server in (follower, *rest)))
    store.migrate()
    try:
        follower.freeze()
        begun = time.monotonic()
        async with running_ledger(store) as ledger:
            assert (await admit(ledger, job("frozen"), WORKER)).accepted
            assert time.monotonic() - begun < 8
            begun = time.monotonic()
            assert await complete(ledger, "frozen")
            assert time.monotonic() - begun < 2  # the host that answered is asked first from here on
    finally:
        follower.thaw()
        store.close()


@trio_test
async def test_after_the_leader_is_killed_writes_go_on_and_nothing_is_lost(cluster: Cluster) -> None:
    store = open_store(cluster.url)
    store.migrate()
    accepted: list[str] = []
    enough = trio.Event()

    async def client(number: int) -> None:
        for count in range(60):
            new = job(f"job-{number:02d}-{count:03d}", tenant_id="cluster", requests_per_minute=10_000)
            assert (await admit(ledger, new)).accepted
            accepted.append(new.id)
            if len(accepted) >= 100:
                enough.set()

    async with running_ledger(store) as ledger, trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(client, number)
        await enough.wait()
        cluster.kill(cluster.leader)
    assert len(accepted) == 480
    assert {found.id for found in store.jobs(tenant_id="cluster", limit=1000)} == set(accepted)
    assert requests_used(store, "cluster") == 480
    store.close()


@trio_test
async def test_a_cluster_without_its_majority_is_unavailable_within_the_deadline(tmp_path: Path) -> None:
    with running_cluster(tmp_path) as cluster:
        store = open_store(cluster.url, deadline_seconds=5)
        store.migrate()
        cluster.kill(1, 2)
        begun = time.monotonic()
        async with running_ledger(store) as ledger:
            with pytest.raises(StoreUnavailable, match="rqlite cannot be reached"):
                await admit(ledger, job())
            assert time.monotonic() - begun < 15
            cluster.start(1)
            again = await admit(ledger, job())
        assert again.accepted
        assert len(store.jobs()) == 1
        store.close()


def test_every_host_of_a_url_is_kept_in_its_order() -> None:
    store = open_store("rqlites://a,b:5,[::1]:6,[::1]")
    database = store._database
    assert isinstance(database, RqliteDatabase)
    assert [str(host) for host in database.hosts] == ["a:4001", "b:5", "::1:6", "::1:4001"]
    store.close()
