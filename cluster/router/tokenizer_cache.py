"""Which prompt is tokenized when, and in which thread; and each tokenizer once, however many replicas share it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from cluster.domain.clock import Clock, MonotonicClock
from cluster.domain.errors import RejectReason, RequestEvicted, RequestRejected
from cluster.router.prompt_turns import Pace, Place, PromptTurns, wait_for_thread
from cluster.router.tokenization import Tokenizer

# Shorter prompts are tokenized on the event loop: about a millisecond, less than a trip to a thread is worth. A chat
# has few messages as well, since templates work for each of them.
INLINE_CHARACTERS = 4096
INLINE_MESSAGES = 32
# Prompts that wait for a thread: their characters, which are held in memory meanwhile. Each counts for so many at
# least, which makes them 512 at most.
WAITING_CHARACTERS_MAX = 2**25
WAITING_CHARACTERS_LEAST = 2**16
# What a message of a chat costs in memory beside its characters: 60 bytes while it waits as it came, and 330 more for
# the dict and the strings that the template sees. Thousands of tiny messages are large.
MESSAGE_BYTES = 400
# What a message costs a thread beside its characters, counted in those: the template's turn and its words around it.
MESSAGE_CHARACTERS = 32
# Longer ones take a large part of a second or more: they leave one thread to the others.
LONG_CHARACTERS = 2**19
# Estimates of waits are noisy, and a refusal costs a request: one is refused when even this share would be too late.
SURE_SHARE = 0.5
# A tokenizer's files come within a second: whoever has waited longer for another one's fetch does not rely on it.
FETCH_PATIENCE_S = 2.0
Result = TypeVar("Result")


class Message(Protocol):
    """One of a chat."""

    @property
    def role(self) -> str: ...
    @property
    def content(self) -> str: ...


@dataclass(slots=True, eq=False)
class _Job:
    """What a thread is to do, and who waits for that, until when."""

    work: Callable[[], Any]
    result: asyncio.Future[Any]
    place: Place
    deadline_s: float
    began_s: float = math.inf  # not yet
    took_s: float = 0.0

    @property
    def is_long(self) -> bool:
        return self.place.work > LONG_CHARACTERS

    def run(self, clock: Clock) -> Any:
        """In a thread."""
        self.began_s = clock.now()
        try:
            return self.work()
        finally:
            self.took_s = clock.now() - self.began_s
            del self  # an error knows this frame

    def left(self, now_s: float, pace: float) -> float:
        """Of its work, which a thread is at or soon will be."""
        return max(0.0, self.place.work - max(0.0, now_s - self.began_s) * pace)


class TokenizerCache:
    """Tokenizers by digest, fetched and built once each, and the threads that long prompts are tokenized in.

    Prompts that wait for a thread go by priority, and take turns by tenant (``prompt_turns``). ``encode`` and
    ``encode_chat`` raise RequestRejected QUEUE_FULL when ``waiting_max`` characters wait, for whoever those turns
    refuse, and RequestEvicted for what cannot be tokenized in the ``left_s`` seconds that there are, as soon as that is
    foreseen. Where there are several ``threads``, one of them takes no prompt of over ``LONG_CHARACTERS``. For one
    event loop.
    """

    def __init__(self, threads: int = 2, waiting_max: int = WAITING_CHARACTERS_MAX, clock: Clock | None = None) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")
        self._idle = threads
        self._idle_for_long = max(1, threads - 1)
        self._waiting_max = waiting_max
        self._clock = clock or MonotonicClock()
        self._turns: PromptTurns[_Job] = PromptTurns(waiting_max)
        self._running: set[_Job] = set()
        self._pace = Pace()
        self._refusal: Callable[[], RequestRejected] | None = None
        self._built: dict[str, asyncio.Future[Tokenizer]] = {}  # by digest; those that are being built as well
        self._fetching: dict[str, asyncio.Future[None]] = {}  # by digest; done when the fetch has ended

    async def obtain(self, digest: str, fetch: Callable[[], Awaitable[Mapping[str, bytes]]]) -> Tokenizer:
        """The tokenizer of the files that hash to ``digest``; calls ``fetch`` for them if nobody else gets them.

        Raises what the own ``fetch`` does: another caller's error makes this one try. CheckpointError as ``build``.
        """
        while (other := self._fetching.get(digest)) is not None:
            _, late = await asyncio.wait([other], timeout=FETCH_PATIENCE_S)
            if late and self._fetching.get(digest) is other:
                break  # one replica that hangs must not keep all others of its checkpoint away
        built = self._built.get(digest)
        if built is None:
            fetching = self._fetching[digest] = asyncio.get_running_loop().create_future()
            try:
                built = self._being_built(digest, await fetch())
            finally:
                fetching.set_result(None)
                if self._fetching.get(digest) is fetching:
                    del self._fetching[digest]
        return await asyncio.shield(built)

    async def build(self, digest: str, files: Mapping[str, bytes]) -> Tokenizer:
        """The tokenizer of ``files``, which hash to ``digest``; whoever asks meanwhile waits for the same build.

        CheckpointError goes to all of them and is not kept: the next one builds again.
        """
        return await asyncio.shield(self._being_built(digest, files))

    def _being_built(self, digest: str, files: Mapping[str, bytes]) -> asyncio.Future[Tokenizer]:
        """To be shielded: others wait for it too."""
        built = self._built.get(digest)
        if built is None:
            built = asyncio.get_running_loop().run_in_executor(self._executor, _build, dict(files))
            self._built[digest] = built
            built.add_done_callback(partial(self._forget_failed, digest))
        return built

    def _forget_failed(self, digest: str, built: asyncio.Future[Tokenizer]) -> None:
        if built.cancelled() or built.exception() is not None:
            del self._built[digest]

    async def encode(
        self,
        tokenizer: Tokenizer,
        text: str,
        *,
        add_special_tokens: bool,
        tenant: str = "",
        priority: int = 0,
        left_s: float | None = None,
    ) -> list[int]:
        """Token ids; a long text is tokenized in a thread so that no stream waits for it."""
        if len(text) <= INLINE_CHARACTERS:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        work = partial(tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return await self._in_turn(self._place(tenant, priority, len(text)), left_s, work)

    async def encode_chat(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        check: Callable[[str], None],
        *,
        tenant: str = "",
        priority: int = 0,
        left_s: float | None = None,
    ) -> list[int]:
        """Token ids of the prompt that ``messages`` make, unless ``check`` refuses it, which may run in a thread.

        ``messages`` are held as they are until a thread has time for them.
        """
        characters = sum(len(message.role) + len(message.content) for message in messages)
        if len(messages) <= INLINE_MESSAGES and characters <= INLINE_CHARACTERS:
            prompt = _rendered(tokenizer, messages, check)
            return await self.encode(
                tokenizer, prompt, add_special_tokens=False, tenant=tenant, priority=priority, left_s=left_s
            )

        def render_and_encode() -> list[int]:
            return tokenizer.encode(_rendered(tokenizer, messages, check), add_special_tokens=False)

        place = self._place(tenant, priority, characters, len(messages))
        return await self._in_turn(place, left_s, render_and_encode)

    def _place(self, tenant: str, priority: int, characters: int, messages: int = 0) -> Place:
        size = max(characters + MESSAGE_BYTES * messages, WAITING_CHARACTERS_LEAST)
        work = characters + MESSAGE_CHARACTERS * messages
        return Place(tenant, priority, min(size, self._waiting_max), work)

    async def _in_turn(self, place: Place, left_s: float | None, work: Callable[[], Result]) -> Result:
        if self._refusal is not None:
            raise self._refusal()
        now_s = self._clock.now()
        deadline_s = math.inf if left_s is None else now_s + left_s
        pace = self._pace.per_second(now_s)
        if pace is not None and left_s is not None:
            takes_s = (self._wait(place, now_s, pace) + place.work) / pace
            if takes_s * SURE_SHARE > left_s:
                raise _too_late(takes_s)
        job = _Job(work, asyncio.get_running_loop().create_future(), place, deadline_s)
        self._let_wait(job)
        self._start_next()
        try:
            async with asyncio.timeout(left_s):
                result: Result = await job.result
        except TimeoutError:
            message = "The deadline came before the prompt was tokenized; allow the request more time."
            raise RequestEvicted(message) from None
        finally:
            self._turns.discard(job)
            del job  # its error knows this frame
        return result

    def _wait(self, place: Place, now_s: float, pace: float) -> float:
        """The work that a thread does before a newcomer's."""
        left = [(job.is_long, job.left(now_s, pace)) for job in self._running] + [(False, 0.0)] * self._idle
        wait = wait_for_thread(self._turns.ahead(place.tenant, place.priority), (one for _, one in left))
        if place.work > LONG_CHARACTERS:
            return wait
        # However many very long ones are ahead, the other threads go on without them.
        ahead = self._turns.ahead(place.tenant, place.priority, LONG_CHARACTERS)
        return min(wait, wait_for_thread(ahead, (one for is_long, one in left if not is_long)))

    def _let_wait(self, job: _Job) -> None:
        for refused in self._turns.add(job, job.place):
            message = "This router has too many prompts to tokenize; try again in a moment."
            _fail(refused, RequestRejected(RejectReason.QUEUE_FULL, message))

    def _start_next(self) -> None:
        while self._idle:
            job = self._turns.next(None if self._idle_for_long else LONG_CHARACTERS)
            if job is None:
                return
            self._refuse_if_late(job)
            if not job.result.done():  # its request may have left a moment ago
                running = asyncio.get_running_loop().run_in_executor(self._executor, job.run, self._clock)
                self._running.add(job)
                self._idle -= 1
                self._idle_for_long -= job.is_long
                running.add_done_callback(partial(self._ended, job))

    def _refuse_if_late(self, job: _Job) -> None:
        """A thread is not kept busy for whoever will not be there any more."""
        now_s = self._clock.now()
        pace = self._pace.per_second(now_s)
        if pace is not None and (takes_s := job.place.work / pace) * SURE_SHARE > job.deadline_s - now_s:
            _fail(job, _too_late(takes_s))

    def _ended(self, job: _Job, running: asyncio.Future[Any]) -> None:
        self._running.discard(job)
        self._idle += 1
        self._idle_for_long += job.is_long
        error = None if running.cancelled() else running.exception()
        finished = error is None and not running.cancelled()
        if finished:
            self._pace.finished(job.place.work, job.took_s, self._clock.now())
        self._start_next()
        if error is not None:
            _fail(job, error)
        elif not finished:
            job.result.cancel()
        elif not job.result.done():  # else its request has left
            job.result.set_result(running.result())

    def refuse(self, refusal: Callable[[], RequestRejected]) -> None:
        """From now on ``refusal`` ends whatever prompt is in a thread, waits for one or would need one.

        Short ones need none and are tokenized as before.
        """
        self._refusal = refusal
        while (job := self._turns.next()) is not None:
            _fail(job, refusal())
        for job in self._running:  # its thread goes on with it, for nobody
            _fail(job, refusal())

    def close(self) -> None:
        """Whoever still waits is cancelled."""
        while (job := self._turns.next()) is not None:
            job.result.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)


def _rendered(tokenizer: Tokenizer, messages: Sequence[Message], check: Callable[[str], None]) -> str:
    prompt = tokenizer.render_chat([{"role": message.role, "content": message.content} for message in messages])
    check(prompt)
    return prompt


def _fail(job: _Job, error: BaseException) -> None:
    if not job.result.done():
        job.result.set_exception(error)


def _too_late(takes_s: float) -> RequestEvicted:
    return RequestEvicted(
        f"The prompt would be tokenized in about {takes_s:.1f} s, later than its deadline allows; allow it more time."
    )


def _build(files: Mapping[str, bytes]) -> Tokenizer:
    tokenizer = Tokenizer(files)
    tokenizer.prepare()  # here, in the thread, rather than on the event loop
    return tokenizer
