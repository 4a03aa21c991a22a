"""The worker: lends this machine's models to the network.

It says what it has (presence), takes the attempts that orchestrators send it while slots are free, hands each to the
runtime child of its model, and passes the tokens back. It keeps no state that matters: if it dies, its attempts go on
elsewhere.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

import msgspec
import trio

from tether import __version__, messages
from tether.child import RuntimeChild
from tether.errors import Draining, InvalidRequest, LinkError, LinkFull, NoWorker, QueueFull, RuntimeDied, TetherError
from tether.link import Link
from tether.links import Links
from tether.messages import InferBusy, InferCancel, InferEnd, InferStart, InferTokens, Presence, Signed
from tether.politeness import Facts
from tether.records import EmbeddingInput, Job, ModelInfo, Usage, WorkerState
from tether.runtime_messages import Cancel, Embed, End, Event, Generate, Loading, Refused, Started, Tokens
from tether.settings import NodeSettings, WorkerSettings
from tether.tasks import start_if_open

log = logging.getLogger(__name__)

NEWS_SECONDS = 0.1
"""From a change to the state that tells it."""
COUNTS_SECONDS = 1.0
"""The same where only counts changed and one orchestrator is there: it sent the jobs, and knows its own."""
LOOK_SECONDS = 2.0
"""How often a polite worker looks at its machine."""
CANCEL_SECONDS = 60.0
"""How long a runtime may take to end a sequence that is cancelled, a long prompt's step among it, before it counts as
hung and is started anew."""


class Offer(msgspec.Struct, frozen=True):
    """A model that this worker is asked to serve: its name and version, and how to start a runtime for it."""

    name: str
    version: str
    arguments: tuple[str, ...]
    toy: bool = False
    variables: tuple[str, ...] = ()
    """Of Tether's environment variables, those that the runtime needs."""


class Running(msgspec.Struct):
    """An attempt on this worker: whose it is and where it runs."""

    link: Link
    start: InferStart
    child: RuntimeChild
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_cancelled: bool = False
    ended: trio.Event = msgspec.field(default_factory=trio.Event)

    @property
    def key(self) -> str:
        """The sequence's id at the child: job and attempt, so that a late event of an older attempt matches nothing."""
        return f"{self.start.job.id}/{self.start.attempt}"


def _embedding_input(job: Job) -> EmbeddingInput:
    try:
        return msgspec.json.decode(job.input.encode("utf-8", "surrogatepass"), type=EmbeddingInput)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidRequest(f"the input is not what vectors can be made of: {exc}", param="input") from exc


def _request_of(running: Running) -> Generate | Embed:
    """Return the attempt as its runtime child is asked for it; raise `InvalidRequest` where it is not to be understood."""
    job = running.start.job
    if job.form == "embedding":
        wanted = _embedding_input(job)
        num_told = len(running.start.emitted[0]) if running.start.emitted else 0
        return Embed(running.key, wanted.inputs, wanted.dimensions, num_told)
    raw, chat = job.form == "prompt", job.form in {"chat", "response"}
    start = running.start
    return Generate(running.key, job.input, job.sampling, start.emitted, raw, chat, start.emitted_text)


class Worker:
    """A worker over `links`, serving `offers`; `sign` signs its states with the node's key."""

    def __init__(
        self,
        links: Links,
        offers: list[Offer],
        *,
        node: NodeSettings,
        settings: WorkerSettings,
        boot_id: str,
        sign: Callable[[bytes], Signed],
        on_loading: Callable[[str, Loading], None] = lambda _name, _loading: None,
        look: Callable[[], Facts] | None = None,
    ) -> None:
        """`look` says how the machine is, for a worker that is to be polite; it may block for a moment."""
        self._links = links
        self._look = look
        self._paused = ""
        self._node = node
        self._settings = settings
        self._boot_id = boot_id
        self._sign = sign
        self._sequence = 0
        self._running: dict[str, Running] = {}
        self._draining = False
        self._tell_at = float("-inf")
        self._changed = trio.Event()
        self._idle = trio.Event()
        self._nursery: trio.Nursery
        self._offers = {(offer.name, offer.version): offer for offer in offers}
        self._children = {key: self._make_child(offer, on_loading) for key, offer in self._offers.items()}
        links.on(InferStart, self._on_start)
        links.on(InferCancel, self._on_cancel)
        links.on_up(self._on_up)
        links.on_down(self._on_down)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started when every model is loaded.

        Raises the runtime's error when a model cannot be loaded at all.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._tell_presence)
            if self._look is not None and self._settings.politeness.is_asked_for:
                nursery.start_soon(self._mind_the_machine, self._look)
            async with trio.open_nursery() as loading:
                for child in self._children.values():
                    loading.start_soon(nursery.start, child.run)
            task_status.started()

    async def drain(self) -> None:
        """Take no new attempts and wait until the running ones have ended."""
        self._draining = True
        self._tell_within(0.0)
        while self._running:
            self._idle = trio.Event()
            await self._idle.wait()

    def hand_over(self) -> None:
        """Give back what still runs: it goes on elsewhere after the tokens that were told."""
        self._draining = True
        self._give_back("the worker left before the answer was whole")

    def _give_back(self, reason: str) -> None:
        self._tell_state()  # first, so that no orchestrator sends one of them back here
        for running in list(self._running.values()):
            self._cancel(running)
            usage = Usage(running.prompt_tokens, running.completion_tokens)
            job_id, attempt = running.start.job.id, running.start.attempt
            self._finish(running, InferEnd(job_id, attempt, "error", usage, Draining(reason).to_info(), retry=True))

    async def _mind_the_machine(self, look: Callable[[], Facts]) -> None:
        """Pause while there is a reason to, and say so; what runs then has the grace time to end, or goes on elsewhere."""
        paused_since = 0.0
        while True:
            facts = await trio.to_thread.run_sync(look, abandon_on_cancel=True)
            reason = self._settings.politeness.why_not(facts, is_paused=bool(self._paused))
            if reason and not self._paused:
                paused_since = trio.current_time()
            if reason != self._paused:
                log.info("paused: %s", reason) if reason else log.info("taking jobs again")
                self._paused = reason
                self._tell_within(0.0)
            if reason and self._running and trio.current_time() - paused_since >= self._node.grace_seconds:
                self._give_back(f"the worker has paused: {reason}")
            await trio.sleep(LOOK_SECONDS)

    @property
    def num_running(self) -> int:
        """How many attempts run here now."""
        return len(self._running)

    @property
    def children(self) -> list[RuntimeChild]:
        """The runtime children, one for each model."""
        return list(self._children.values())

    # --- from the orchestrator ---------------------------------------------------------------------------------------

    def _on_start(self, link: Link, start: InferStart) -> None:
        for older in self._older_attempts(start):
            log.info("stopping an older attempt", extra={"job_id": start.job.id})
            self._cancel(older)
        try:
            running = self._admit(link, start)
            running.child.send(_request_of(running))
        except InvalidRequest as exc:
            log.warning("refused: %s", exc.message, extra={"job_id": start.job.id})
            self._send(link, InferEnd(start.job.id, start.attempt, "error", Usage(), exc.to_info(), retry=False))
            return
        except TetherError as exc:
            log.info("busy: %s", exc.message, extra={"job_id": start.job.id})
            self._send(link, InferBusy(start.job.id, start.attempt, exc.to_info()))
            return
        self._running[running.key] = running
        self._tell_counts()

    def _older_attempts(self, start: InferStart) -> list[Running]:
        """Return attempts at the same job that this one replaces: their orchestrator was thought to be lost."""
        if start.attempt <= 1:
            return []
        return [
            running
            for running in self._running.values()
            if running.start.job.id == start.job.id and running.start.attempt < start.attempt
        ]

    def _admit(self, link: Link, start: InferStart) -> Running:
        """Return the attempt's place here; raise why there is none."""
        if self._draining:
            raise Draining("this worker is stopping")
        if self._paused:
            raise Draining(f"this worker has paused: {self._paused}")
        child = self._children.get((start.job.model, start.job.version))
        if child is None:
            raise NoWorker(f"this worker does not serve {start.job.model} {start.job.version}")
        if child.model is None:
            raise RuntimeDied(f"the runtime of {child.name} is not ready")
        running = Running(link, start, child)
        if running.key in self._running:
            raise QueueFull("this attempt runs here already")
        if sum(other.child is child for other in self._running.values()) >= child.model.slots:
            raise QueueFull("every slot of this worker is taken")
        return running

    def _on_cancel(self, link: Link, cancel: InferCancel) -> None:
        running = self._running.get(f"{cancel.job_id}/{cancel.attempt}")
        if running is not None and running.link.peer_id == link.peer_id:
            self._cancel(running)

    def _on_up(self, link: Link) -> None:
        if "orchestrator" in link.roles:
            self._send(link, self._presence())

    def _on_down(self, link: Link, _reason: str) -> None:
        for running in [r for r in self._running.values() if r.link is link]:
            log.info("the orchestrator %s is gone; stopping its job", link.name, extra={"job_id": running.start.job.id})
            self._cancel(running)

    def _cancel(self, running: Running) -> None:
        try:
            running.child.send(Cancel(running.key))
        except RuntimeDied as exc:
            log.debug("nothing to cancel: %s", exc.message)  # what ran on it has been told as lost
            return
        if not running.is_cancelled:
            running.is_cancelled = True
            start_if_open(self._nursery, self._kill_if_hung, running)

    async def _kill_if_hung(self, running: Running) -> None:
        """See that a cancelled attempt gives its slot back, whatever its runtime does."""
        with trio.move_on_after(CANCEL_SECONDS):
            await running.ended.wait()
            return
        log.error("the runtime of %s does not answer to a cancel; killing it", running.child.name)
        running.child.kill()

    # --- from the runtime child --------------------------------------------------------------------------------------

    def _make_child(self, offer: Offer, on_loading: Callable[[str, Loading], None]) -> RuntimeChild:
        def on_loading_here(loading: Loading) -> None:
            on_loading(offer.name, loading)

        def on_ready(_model: ModelInfo) -> None:
            log.info("%s %s is ready", offer.name, offer.version)
            self._tell_within(NEWS_SECONDS)

        def on_lost() -> None:
            self._on_child_lost(child)

        def on_event(event: Event) -> None:
            self._on_event(child, event)

        child = RuntimeChild(
            offer.name,
            list(offer.arguments),
            on_event=on_event,
            on_ready=on_ready,
            on_lost=on_lost,
            on_loading=on_loading_here,
            variables=offer.variables,
        )
        return child

    def _on_event(self, child: RuntimeChild, event: Event) -> None:
        match event:
            case Tokens(id=key, position=position, token_ids=ids):
                running = self._running.get(key)
                if running is not None:
                    running.completion_tokens += len(ids)
                    job = running.start.job
                    told = (event.text, event.choice, event.logprobs)
                    self._send(running.link, InferTokens(job.id, running.start.attempt, position, ids, *told))
            case Started(id=key, prompt_tokens=prompt_tokens):
                if (running := self._running.get(key)) is not None:
                    running.prompt_tokens = prompt_tokens
            case End(id=key):
                if child.model is not None:
                    child.model = _with_figures(child.model, event)
                if (running := self._running.get(key)) is not None:
                    self._finish(running, _end_of(running, event))
            case Refused(id=key, error=error):
                log.error("the runtime of %s refused a request: %s", child.name, error.message)
                if key is not None and (running := self._running.get(key)) is not None:
                    job = running.start.job
                    self._finish(running, InferEnd(job.id, running.start.attempt, "error", Usage(), error))
            case _:
                log.warning("the runtime of %s sent an unexpected %s", child.name, type(event).__name__)

    def _on_child_lost(self, child: RuntimeChild) -> None:
        self._tell_state()  # first, so that no orchestrator sends the same job back here before there is a runtime
        error = RuntimeDied(f"the runtime of {child.name} died").to_info()
        for running in [r for r in self._running.values() if r.child is child]:
            job_id, attempt = running.start.job.id, running.start.attempt
            usage = Usage(running.prompt_tokens, running.completion_tokens)
            self._finish(running, InferEnd(job_id, attempt, "error", usage, error, retry=True))

    def _finish(self, running: Running, end: InferEnd | InferBusy) -> None:
        del self._running[running.key]
        running.ended.set()
        self._send(running.link, end)
        self._tell_counts()
        if not self._running:
            self._idle.set()

    # --- presence ----------------------------------------------------------------------------------------------------

    async def _tell_presence(self) -> None:
        while True:
            self._tell_at = trio.current_time() + self._settings.presence_seconds
            self._tell_state()
            while (seconds := self._tell_at - trio.current_time()) > 0:
                self._changed = trio.Event()
                with trio.move_on_after(seconds):
                    await self._changed.wait()

    def _tell_state(self) -> None:
        if orchestrators := self._links.with_role("orchestrator"):
            presence = self._presence()
            for link in orchestrators:
                self._send(link, presence)

    def _tell_within(self, seconds: float) -> None:
        """Tell the next state in so many seconds at the latest."""
        at = trio.current_time() + seconds
        if at < self._tell_at:
            self._tell_at = at
            self._changed.set()

    def _tell_counts(self) -> None:
        """Tell soon how many attempts run; under load every job is a change, so several are told at once."""
        alone = len(self._links.with_role("orchestrator")) <= 1
        self._tell_within(COUNTS_SECONDS if alone else NEWS_SECONDS)

    def _presence(self) -> Presence:
        self._sequence += 1
        state = WorkerState(
            worker_id=self._links.peer_id,
            boot_id=self._boot_id,
            sequence=self._sequence,
            sent_at=time.time(),
            name=self._node.name,
            region=self._node.region,
            gpu_class=self._settings.gpu_class,
            models=tuple(self._model(key) for key in self._offers),
            running=len(self._running),
            held=dict(Counter(running.link.peer_id for running in self._running.values())),
            draining=self._draining,
            loading=any(child.model is None for child in self._children.values()),
            version=__version__,
            paused=self._paused,
        )
        return Presence(self._sign(messages.encode(state)))

    def _model(self, key: tuple[str, str]) -> ModelInfo:
        """Return the model as it is served now: without slots while its runtime is not ready."""
        offer, model = self._offers[key], self._children[key].model
        if model is None:
            return ModelInfo(offer.name, offer.version, slots=0, toy=offer.toy)
        return msgspec.structs.replace(model, name=offer.name, version=offer.version, toy=offer.toy)

    def _send(self, link: Link, message: Presence | InferBusy | InferTokens | InferEnd) -> None:
        """Send; a link that has just gone needs nothing more, since its end is told to `_on_down`."""
        try:
            link.send(message)
        except LinkFull as exc:
            # A token that is left out spoils its answer, an end that is left out hangs its job: let it begin anew.
            log.warning("closing the link to %s: %s", link.name, exc.message)
            link.close("it does not read")
        except LinkError as exc:
            log.debug("not sent to %s: %s", link.peer_id, exc.message)


def _end_of(running: Running, end: End) -> InferEnd | InferBusy:
    """Return what is told of an attempt whose runtime has ended it.

    A job of several choices takes as many places of the batch: a runtime may be full while slots are free.
    """
    job_id, attempt = running.start.job.id, running.start.attempt
    if end.error is not None and end.error.code == QueueFull.code and not running.completion_tokens:
        return InferBusy(job_id, attempt, end.error)
    return InferEnd(job_id, attempt, end.finish_reason, end.usage, end.error, end.retry, end.choices)


def _with_figures(model: ModelInfo, end: End) -> ModelInfo:
    """Return the model with what its runtime measured by the end of a job; what it does not say stays as it was."""
    stats = end.stats
    if end.tokens_per_second:
        model = msgspec.structs.replace(model, tokens_per_second=end.tokens_per_second)
    if stats is None:
        return model
    return msgspec.structs.replace(
        model,
        time_to_first_token_seconds=stats.time_to_first_token_seconds or model.time_to_first_token_seconds,
        free_kv_tokens=max(0, stats.free_kv_tokens),
        num_waiting=stats.waiting,
    )
