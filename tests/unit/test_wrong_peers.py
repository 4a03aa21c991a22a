"""What an admitted peer says that is wrong costs it its own link, or its own attempt, and nobody else anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.support import GatewayNode, HandOrchestrator, HandWorker, Peer, open_world, until
from tests.support import make_job as job
from tether.bounds import MAX_MODELS, MAX_NAME_CHARS
from tether.errors import ErrorInfo
from tether.link import Link
from tether.messages import (
    InferBusy,
    InferEnd,
    InferTokens,
    JobEnd,
    JobQueued,
    JobTokens,
    LinkMessage,
    ListJobs,
    Submit,
    Watch,
)
from tether.plausible import MAX_CHARS_PER_TOKEN, TEMPLATE_TOKENS
from tether.records import Job, ModelInfo, Sampling, TokenLogprobs, Usage
from tether.testing import in_trio

HUGE = 10**400
OTHER = (ModelInfo("other", "1.0", slots=1),)

WRONG_STATES: list[dict[str, object]] = [
    {"running": 2**63},
    {"running": -1},
    {"held": {"x": -HUGE}},
    {"held": {"x": HUGE}},
    {"sequence": HUGE},
    {"sent_at": 1e300},
    {"name": "x" * (MAX_NAME_CHARS + 1)},
    {"boot_id": "x" * (MAX_NAME_CHARS + 1)},
    {"name": "two\nlines"},
    {"region": "\x9b2J"},
    {"models": (ModelInfo("\x1b[2J", "1.0"),)},
    {"models": (ModelInfo("demo", "1.0", slots=HUGE),)},
    {"models": (ModelInfo("demo", "1.0", slots=-1),)},
    {"models": (ModelInfo("demo", "1" * 5000),)},
    {"models": (ModelInfo("x" * 5000, "1.0"),)},
    {"models": (ModelInfo("demo", "1.0", context_tokens=2**63),)},
    {"models": (ModelInfo("demo", "1.0", free_kv_tokens=-1),)},
    {"models": (ModelInfo("demo", "1.0", tokens_per_second=1e308),)},
    {"models": (ModelInfo("demo", "1.0", tokens_per_second=-1.0),)},
    {"models": (ModelInfo("demo", "1.0", time_to_first_token_seconds=float("nan")),)},
    {"models": tuple(ModelInfo(f"model-{number}", "1.0") for number in range(MAX_MODELS + 1))},
]


async def loses_its_link(at: Peer, peer: Peer, link: Link) -> None:
    """Wait until a peer's link is down, and a new one is up."""
    await until(lambda: not link.is_open)
    await until(lambda: peer.links.get(at.id) is not None and at.links.get(peer.id) is not None)


def link_to(at: Peer, peer: Peer) -> Link:
    link = at.links.get(peer.id)
    assert link is not None
    return link


async def completes(gateway: GatewayNode, worker: HandWorker, new: Job | None = None) -> JobEnd:
    """Have a job answered."""
    new = new or job()
    client = gateway.client(new)
    await worker.start_of(new)
    worker.tokens(new, 1, 0)
    worker.end(new)
    end = await client.end()
    assert (end.status, client.text) == ("completed", "0 ")
    return end


# --- workers ---------------------------------------------------------------------------------------------------------


@in_trio(seconds=60)
async def test_a_worker_that_says_numbers_that_nothing_can_be_counted_with_loses_its_link_and_the_others_serve_on(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        wrong = await world.hand_worker(orchestrator, name="wrong", models=OTHER)
        gateway_link = link_to(orchestrator, gateway)
        for state in WRONG_STATES:
            link = link_to(orchestrator, wrong)
            wrong.tell(None, **state)
            await loses_its_link(orchestrator, wrong, link)
            await world.known(wrong, orchestrator)
            await completes(gateway, worker, job(version=""))
        await until(lambda: {record.name for record in world.store.workers()} == {"worker", "wrong"})
        await until(lambda: {model.name for model in world.store.models()} == {"demo", "other"})
        assert orchestrator.housekeeping.store_error is None
        assert gateway_link.is_open


@in_trio()
async def test_a_busy_worker_that_holds_less_than_nothing_for_others_does_not_end_the_orchestrator(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, wrong, gateway = await world.one_of_each(name="wrong")
        new = job()
        client = gateway.client(new)
        await wrong.start_of(new)
        link = link_to(orchestrator, wrong)
        wrong.busy(new)
        wrong.tell(held={"x": -HUGE})
        await loses_its_link(orchestrator, wrong, link)
        await wrong.start_of(new, 2)
        wrong.end(new, 2)
        assert (await client.end()).status == "completed"


@in_trio()
async def test_a_worker_may_have_as_much_as_a_state_can_say(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        most = tuple(
            ModelInfo(
                f"model-{number}".ljust(MAX_NAME_CHARS, "x"),
                "9" * MAX_NAME_CHARS,
                slots=65_536,
                context_tokens=2**31 - 1,
                tokens_per_second=1e12,
                time_to_first_token_seconds=5e-324,
                free_kv_tokens=2**63 - 1,
                num_waiting=2**31 - 1,
            )
            for number in range(MAX_MODELS)
        )
        orchestrator, worker, gateway = await world.one_of_each(models=most)
        worker.tell(held={f"orchestrator-{number}": 2**31 - 1 for number in range(1000)}, running=2**31 - 1)
        worker.tell()
        end = await completes(gateway, worker, job(model=most[0].name, version=""))
        assert end.usage == Usage(3, 1)
        await until(lambda: len(world.store.models()) == MAX_MODELS)
        assert orchestrator.housekeeping.store_error is None


WRONG_FRAMES: dict[str, Callable[[Job], LinkMessage]] = {
    "usage below nothing": lambda new: InferEnd(new.id, 1, "stop", Usage(-(10**6), -(10**9))),
    "usage beyond the store": lambda new: InferEnd(new.id, 1, "stop", Usage(2**64, 1)),
    "a position below nothing": lambda new: InferTokens(new.id, 1, -1, (0,), "0 "),
    "a choice beyond all": lambda new: InferTokens(new.id, 1, 0, (0,), "0 ", HUGE),
    "an id beyond all": lambda new: InferTokens(new.id, 1, 0, (HUGE,), "0 "),
    "an endless message": lambda new: InferBusy(new.id, 1, ErrorInfo("queue_full", "x" * 20_000)),
    "an endless pause": lambda new: InferBusy(new.id, 1, ErrorInfo("queue_full", "full", None, 1e300)),
    "reasons beyond the store": lambda new: InferBusy(new.id, 1, ErrorInfo("queue_full", "full", reasons={"x": HUGE})),
}


@pytest.mark.parametrize("name", WRONG_FRAMES)
@in_trio()
async def test_a_worker_that_sends_what_no_worker_can_mean_loses_its_link_and_its_job_goes_on_elsewhere(
    tmp_path: Path, name: str
) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, wrong, gateway = await world.one_of_each(name="wrong")
        new = job()
        client = gateway.client(new)
        await wrong.start_of(new)
        worker = await world.hand_worker(orchestrator)
        link = link_to(orchestrator, wrong)
        wrong.models = OTHER
        wrong.link_of(new, 1).send(WRONG_FRAMES[name](new))
        await loses_its_link(orchestrator, wrong, link)
        await worker.start_of(new, 2)
        worker.tokens(new, 2, 0)
        worker.end(new, 2)
        end = await client.end()
        assert (end.status, client.text, end.usage) == ("completed", "0 ", Usage(3, 1))
        assert world.ended(new).usage == Usage(3, 1)


WHAT_TOKENS: dict[str, Callable[[Job], LinkMessage]] = {
    "tokens": lambda new: InferTokens(new.id, 1, 1, (1, 2), "1 2 "),
    "characters": lambda new: InferTokens(new.id, 1, 1, (), "x" * (2 * MAX_CHARS_PER_TOKEN)),
    "log-probabilities": lambda new: InferTokens(new.id, 1, 1, (1,), "1 ", 0, (TokenLogprobs(-1.0),)),
}


@pytest.mark.parametrize("what", WHAT_TOKENS)
@in_trio()
async def test_an_answer_beyond_what_was_asked_for_is_broken_off_and_goes_on_elsewhere(
    tmp_path: Path, what: str
) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, wrong, gateway = await world.one_of_each(name="wrong")
        new = job(sampling=Sampling(max_tokens=2))
        client = gateway.client(new)
        await wrong.start_of(new)
        worker = await world.hand_worker(orchestrator)
        wrong.tokens(new, 1, 0)
        link = wrong.link_of(new, 1)
        link.send(WHAT_TOKENS[what](new))
        link.send(InferTokens(new.id, 1, 1, (1,), "late "))
        await wrong.cancel_of(new)
        start = await worker.start_of(new, 2)
        assert start.emitted == ((0,),)
        worker.tokens(new, 2, 1)
        worker.end(new, 2, usage=Usage(3, 2))
        end = await client.end()
        assert (end.status, client.text, client.token_ids) == ("completed", "0 1 ", [0, 1])
        assert world.attempts(new)[0].status == "lost"
        assert link.is_open


@in_trio()
async def test_tokens_that_say_nothing_are_not_passed_on(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        _, worker, gateway = await world.one_of_each()
        new = job()
        client = gateway.client(new)
        await worker.start_of(new)
        for _ in range(100):
            worker.link_of(new, 1).send(InferTokens(new.id, 1, 0, (), ""))
        worker.tokens(new, 1, 0)
        worker.end(new)
        await client.end()
        assert len(client.of(JobTokens)) == 1


@in_trio()
async def test_a_worker_cannot_have_more_tokens_paid_than_the_job_can_take(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        _, worker, gateway = await world.one_of_each()
        sampling = Sampling(max_tokens=10, n=2)
        for said, counted in (
            (Usage(2**53, 2**53), Usage(4 * len("tokens=1") + TEMPLATE_TOKENS, 20)),
            (Usage(300, 20), Usage(300, 20)),
            (Usage(), Usage()),
        ):
            new = job(sampling=sampling)
            client = gateway.client(new)
            await worker.start_of(new)
            worker.end(new, usage=said)
            assert (await client.end()).usage == counted
            assert world.ended(new).usage == counted


# --- gateways --------------------------------------------------------------------------------------------------------


def _sampling(**changes: object) -> Submit:
    return Submit(job(sampling=msgspec.structs.replace(Sampling(), **changes)))


WRONG_SUBMITS: list[LinkMessage] = [
    Submit(job(deadline_seconds=-1.0)),
    Submit(job(deadline_seconds=1e300)),
    Submit(job(deadline_seconds=float("nan"))),
    Submit(job(priority=2**70)),
    Submit(job(created_at=1e300)),
    Submit(job(requests_per_minute=HUGE)),
    Submit(job(), seconds_left=-1.0),
    Submit(job(), emitted=((HUGE,),), texts=("x",)),
    _sampling(max_tokens=-1),
    _sampling(max_tokens=-HUGE),
    _sampling(max_tokens=2**63),
    _sampling(n=10**9),
    _sampling(n=0),
    _sampling(seed=2**64),
    _sampling(top_k=HUGE),
    _sampling(logit_bias={HUGE: 1.0}),
    Watch("job", ((-HUGE, -1),)),
    ListJobs(1, limit=HUGE),
    ListJobs(HUGE),
]


@in_trio(seconds=60)
async def test_a_gateway_that_submits_what_no_client_may_ask_loses_its_link_and_the_others_are_served(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        wrong = await world.gateway(name="wrong")
        good_link = link_to(orchestrator, gateway)
        for message in WRONG_SUBMITS:
            link = link_to(orchestrator, wrong)
            link_to(wrong, orchestrator).send(message)
            await loses_its_link(orchestrator, wrong, link)
        await completes(gateway, worker)
        assert good_link.is_open
        assert worker.starts[0].job.id == worker.starts[-1].job.id


@in_trio()
async def test_a_submit_whose_texts_and_tokens_do_not_match_is_run_from_what_is_sure(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        wrong = await world.gateway(name="wrong")
        new = job()
        link_to(wrong, orchestrator).send(Submit(new, ((1, 2), (3,), (4,)), ()))
        assert (await worker.start_of(new)).emitted == ()
        worker.end(new)
        await until(lambda: orchestrator.orchestrator.get(new.id) is None)
        await completes(gateway, worker)


@in_trio()
async def test_a_watcher_who_has_seen_more_than_there_is_hears_what_comes(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        other = await world.gateway(name="other")
        new = job()
        client = gateway.client(new)
        await worker.start_of(new)
        link_to(other, orchestrator).send(Watch(new.id, ((2**31 - 1, 2**31 - 1),) * 1000))
        await until(lambda: (active := orchestrator.orchestrator.get(new.id)) is not None and active.watchers)
        worker.tokens(new, 1, 0)
        worker.end(new)
        assert (await client.end()).status == "completed"


# --- orchestrators ---------------------------------------------------------------------------------------------------


WRONG_EVENTS: dict[str, Callable[[Job], LinkMessage]] = {
    "a place beyond the store": lambda new: JobQueued(new.id, HUGE, 1.0),
    "a wait below nothing": lambda new: JobQueued(new.id, 1, 1.0, -1.0),
    "a position below nothing": lambda new: JobTokens(new.id, 1, -1, (0,), "0 "),
    "usage below nothing": lambda new: JobEnd(new.id, "completed", 1, "stop", Usage(-1, -1)),
    "an attempt beyond all": lambda new: JobEnd(new.id, "completed", HUGE, "stop", Usage()),
}


@pytest.mark.parametrize("name", WRONG_EVENTS)
@in_trio()
async def test_an_orchestrator_that_tells_what_cannot_be_loses_its_link_and_the_job_is_brought_anew(
    tmp_path: Path, name: str
) -> None:
    async with open_world(tmp_path) as world:
        wrong = HandOrchestrator(world, name="wrong")
        await world.start(wrong)
        gateway = await world.gateway()
        new = job()
        client = gateway.client(new)
        await wrong.next(Submit)
        link = link_to(gateway, wrong)
        wrong.send(gateway, WRONG_EVENTS[name](new))
        await until(lambda: not link.is_open)
        again = await wrong.next(Submit, 2)
        assert (again.job.id, again.lost_id) == (new.id, wrong.id)
        wrong.send(gateway, JobEnd(new.id, "completed", 1, "stop", Usage(1, 0)))
        assert (await client.end()).usage == Usage(1, 0)


@in_trio()
async def test_what_a_worker_calls_its_models_is_not_remembered_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tether.ledger.MAX_MODELS_KEPT", 3)
    monkeypatch.setattr("tether.roster.MAX_REMEMBERED", 3)
    async with open_world(tmp_path) as world:
        orchestrator, _, _ = await world.one_of_each()
        wrong = await world.hand_worker(orchestrator, name="wrong", models=OTHER)
        for number in range(20):
            wrong.tell(models=(ModelInfo(f"model-{number}", "1.0"),))
        wrong.models = (ModelInfo("the last", "1.0"),)
        wrong.tell()
        await until(lambda: "the last" in {model.name for model in world.store.models()})
        assert len(world.store.models()) <= 3
        await until(lambda: "the last" in orchestrator.roster.known_models)
        assert len(orchestrator.roster.known_models) == 3
