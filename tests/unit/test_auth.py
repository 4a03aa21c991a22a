"""The gateway's side of keys, with an authority and a clock played by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tether import auth as auth_module
from tether import keys
from tether.auth import BELIEF_SECONDS, MAX_KNOWN, Access, Client
from tether.errors import InvalidKey, JobNotFound, NoOrchestrator, PermissionDenied
from tether.messages import Authenticated
from tether.records import Caller, Scope

KEY = keys.new_key()


class Authority:
    """Knows one key, until it is taken back."""

    def __init__(self, *scopes: Scope, valid_seconds: float | None = None) -> None:
        self.caller: Caller | None = Caller("key-1", "acme", frozenset(scopes or ("models",)), valid_seconds)
        self.required = True
        self.error: Exception | None = None
        self.asked: list[str | None] = []
        self.now = 0.0
        self.answering = asyncio.Event()
        self.answering.set()

    async def authenticate(self, key_digest: str | None) -> Authenticated:
        self.asked.append(key_digest)
        await self.answering.wait()
        if self.error is not None:
            raise self.error
        good = key_digest == keys.digest(KEY)
        return Authenticated(0, self.required, self.caller if good else None)

    def access(self, *, always: bool = False) -> Access:
        return Access(self, always=always, clock=lambda: self.now)


def asyncio_test(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 20))

    run.__name__ = test.__name__
    return run


@asyncio_test
async def test_a_key_says_who_the_client_is_and_is_asked_for_once_in_a_while() -> None:
    authority = Authority()
    access = authority.access()
    for _ in range(3):
        client = await access.client(f"Bearer {KEY}", "run")
    assert (client.key_id, client.tenant_id, client.is_anybody) == ("key-1", "acme", False)
    assert await access.client(f"bearer   {KEY} ", "look") == client
    assert len(authority.asked) == 1
    authority.now += BELIEF_SECONDS
    await access.client(f"Bearer {KEY}", "run")
    assert len(authority.asked) == 2
    assert KEY not in str(authority.asked), "the key itself stays here"


@asyncio_test
async def test_a_revoked_key_is_believed_for_less_than_five_seconds() -> None:
    authority = Authority()
    access = authority.access()
    await access.client(f"Bearer {KEY}", "run")
    authority.caller = None
    authority.now += 4.99
    with pytest.raises(InvalidKey, match="revoked"):
        await access.client(f"Bearer {KEY}", "run")


@asyncio_test
async def test_a_key_is_not_believed_beyond_its_own_end() -> None:
    authority = Authority(valid_seconds=0.5)
    access = authority.access()
    await access.client(f"Bearer {KEY}", "run")
    authority.caller = None
    authority.now += 0.5
    with pytest.raises(InvalidKey):
        await access.client(f"Bearer {KEY}", "run")


@asyncio_test
async def test_without_a_good_key_nobody_gets_in_once_there_are_keys() -> None:
    access = Authority().access()
    for header in (None, "", "Bearer", f"Basic {KEY}", KEY, "Bearer sk-x", f"Bearer {keys.new_key()}", "Bearer é"):
        with pytest.raises(InvalidKey) as caught:
            await access.client(header, "look")
        assert caught.value.status == 401


@asyncio_test
async def test_without_keys_in_the_network_anybody_gets_in_unless_others_can_reach_the_gateway() -> None:
    authority = Authority()
    authority.required = False
    access = authority.access()
    for header in (None, "Bearer sk-none", f"Bearer {keys.new_key()}"):
        assert (await access.client(header, "run")).is_anybody
    with pytest.raises(InvalidKey):
        await authority.access(always=True).client(None, "look")
    authority.required = True
    authority.now += BELIEF_SECONDS
    with pytest.raises(InvalidKey):
        await access.client(None, "run")


@asyncio_test
async def test_while_nobody_can_say_nobody_gets_in() -> None:
    authority = Authority()
    authority.error = NoOrchestrator()
    with pytest.raises(NoOrchestrator):
        await authority.access().client(f"Bearer {KEY}", "run")


@asyncio_test
async def test_many_who_come_at_once_are_one_question_and_one_who_leaves_takes_no_answer_away() -> None:
    authority = Authority()
    authority.answering.clear()
    access = authority.access()
    waiting = [asyncio.create_task(access.client(f"Bearer {KEY}", "run")) for _ in range(20)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    authority.answering.set()
    assert {(await each).key_id for each in waiting[1:]} == {"key-1"}
    assert len(authority.asked) == 1


@asyncio_test
async def test_guesses_take_a_bounded_amount_of_memory() -> None:
    access = Authority().access()
    for _ in range(MAX_KNOWN + 50):
        with pytest.raises(InvalidKey):
            await access.client(f"Bearer {keys.new_key()}", "run")
    assert len(access._known) == MAX_KNOWN
    assert not access._asking


@asyncio_test
async def test_an_open_request_is_ended_when_its_key_is_and_only_then() -> None:
    authority = Authority(valid_seconds=0.05)
    access = authority.access()
    client = await access.client(f"Bearer {KEY}", "run")
    ended = asyncio.Event()
    with access.hold(client, lambda: None):
        pass  # has left before
    with access.hold(client, ended.set):
        authority.now += 1
        while len(authority.asked) < 3:  # good still, so it is asked again
            await asyncio.sleep(0.01)
            authority.now += 1
        assert not ended.is_set()
        authority.error = NoOrchestrator()
        while len(authority.asked) < 5:
            await asyncio.sleep(0.01)
            authority.now += 1
        assert not ended.is_set(), "an orchestrator that is away ends nothing"
        authority.error, authority.caller = None, None
        await ended.wait()
    assert not access._held


def test_a_key_whose_belief_ends_first_is_not_asked_for_late_because_another_one_is_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(auth_module, "BELIEF_SECONDS", 1000.0)

    async def test() -> None:
        authority = Authority()
        access = authority.access()
        early = await access.client(f"Bearer {KEY}", "run")
        ended = asyncio.Event()
        with access.hold(early, lambda: None):
            await asyncio.sleep(0)  # the watch sleeps until it is to ask again
            authority.now, authority.caller = 1000.0, None
            with access.hold(early, ended.set):
                await ended.wait()

    asyncio.run(asyncio.wait_for(test(), 20))


def client(*scopes: Scope) -> Client:
    return Client("key-1", "acme", frozenset(scopes), "digest")


def test_a_key_s_tenant_is_the_jobs_tenant_and_another_one_is_refused() -> None:
    assert Client().tenant_for_job("t") == "t"
    assert Client().tenant_for_job(None) is None
    assert client("models").tenant_for_job(None) == client("models").tenant_for_job("acme") == "acme"
    with pytest.raises(PermissionDenied) as caught:
        client("models", "read-only").tenant_for_job("other", param="tenant")
    assert caught.value.param == "tenant"
    assert client("admin").tenant_for_job("other") == "other"


def test_another_s_job_is_not_there_and_an_admin_sees_all() -> None:
    plain, admin = client("read-only"), client("admin")
    assert plain.tenant_to_see(None) == plain.tenant_to_see("acme", job_id="j") == "acme"
    with pytest.raises(JobNotFound):
        plain.tenant_to_see("other", job_id="j")
    with pytest.raises(PermissionDenied):
        plain.tenant_to_see("other")
    for sees in (admin, Client()):
        assert sees.tenant_to_see(None) is None
        assert sees.tenant_to_see("other", job_id="j") == "other"


def test_scopes_say_what_a_key_may_do() -> None:
    for need in ("run", "look"):
        client("models").check(need)
        client("admin").check(need)
    client("read-only").check("look")
    with pytest.raises(PermissionDenied, match="read-only"):
        client("read-only").check("run")
